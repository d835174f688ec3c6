"""Program, values, ops, specs, and the walk over jaxprs; depends on nothing above."""

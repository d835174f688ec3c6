"""Pipeline schedules as pure tables of tasks; nothing is here yet."""

"""Verifying that copies of a block are wired alike, and numbering them.

The criterion is in `ties`; here it is applied to a program as arrays, to all copies of
a candidate at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from autoshard.ir.signatures import Flat, Ints, hashed

_MULTIPLES = 24
"""Blocks of up to so many look-alikes are tried (local and global layers in turns)."""

_FAR = 1 << 62
_FEWEST_OPS = 4
_FEWEST_ALONE = (3, 16)
"""Copies and ops of a repeat that neither is a chain nor belongs to another repeat. Two
siblings side by side are as likely two roles, queries and keys, as two copies."""


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """A verified repeat.

    Attributes:
        place: Start, period, count.
        taken: Value per copy and operand.
        made: Value per copy and result.
        own: Columns of `taken` that hold inputs of each copy, each input once.
        root: The repeat whose copies number these; -1 for this one itself.
        labels: The number of each copy, as that repeat counts.
        passed: Columns of `made` that the next copy takes.
        alone: Whether the copies neither feed each other nor belong to another repeat.
    """

    place: tuple[int, int, int]
    taken: Ints
    made: Ints
    own: Ints
    root: int
    labels: Ints
    passed: np.ndarray
    alone: bool


@dataclass
class Finder:
    """Verifies candidates in order of execution, and remembers what they tie.

    The values of all copies at one place form a class; `labels` says which copy each
    belongs to, as the repeat `roots[class]` counts them.
    """

    flat: Flat
    extents: tuple[Ints, Ints]
    region_kinds: Ints
    region_parents: Ints
    found: list[tuple[int, int, int]] = field(default_factory=list)
    numbered: list[tuple[int, Ints]] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = len(self.flat.kind)
        self.representative = np.arange(len(self.flat.code))
        self.tied = np.arange(values)
        self.classes = np.full(values, -1)
        self.labels = np.zeros(values, dtype=np.int64)
        self.own = np.zeros(values, dtype=bool)
        self.passed = np.zeros(0, dtype=bool)
        self.roots: list[int] = []
        self.numbers: list[Ints] = []

    def verify(self, begin: int, end: int, period: int) -> None:
        """Ties what holds of a candidate, as blocks of one look-alike or of several."""
        best: list[Copies] = []
        most = 0
        for k in range(1, _MULTIPLES + 1):
            if 2 * k * period > end - begin:
                break
            windows = self._windows(begin, end, period, k)
            tied = sum(w.place[1] * (w.place[2] - 1) for w in windows)
            if tied > most:
                best, most = windows, tied
            if most >= end - begin - (k + 1) * period:
                break  # larger blocks tie less
        for copies in best:
            self._tie(copies)

    def _windows(self, begin: int, end: int, unit: int, times: int) -> list[Copies]:
        """Repeats in a stretch, cut where its copies are not wired alike.

        A chain may begin only where it is fed from elsewhere and end only where it
        feeds something else; `first` and `last` are the ops at which that is seen.
        """
        period = unit * times
        hard, first, last = self._differences(begin, end, period)
        windows: list[Copies] = []
        done = begin
        bounds = np.concatenate([[begin - 1], hard, [end - period]])
        for gap in np.flatnonzero(np.diff(bounds) > period):
            # The last copy of a window reaches beyond the gap in which it was found.
            at, stop = max(done, int(bounds[gap]) + 1), int(bounds[gap + 1])
            while stop - at >= period:
                entry, start = _after(first, at), at
                if entry < min(at + period, stop):
                    latest = first[np.searchsorted(first, entry + period) - 1]
                    start = max(at, int(latest) - period + 1)
                limit = min(stop, _after(first, start + period))
                count = (limit - start) // period + 1
                slack = limit - start - (count - 1) * period
                exit_ = _after(last, start)
                if (exit_ - start) // period + 2 < count:
                    count = (exit_ - start) // period + 2
                    slack = (exit_ - start) % period
                start += self._cut(start, slack, period, unit)
                copies = self._longest(start, period, count)
                if copies is None:
                    at = start + period
                else:
                    windows.append(copies)
                    at = done = copies.place[0] + copies.place[1] * copies.place[2]
        return windows

    def _differences(self, begin: int, end: int, period: int) -> tuple[Ints, ...]:
        """Ops that are not wired like the op a period later.

        Returns:
            Ops where nothing excuses it; where the first of two copies is fed from
            elsewhere; where the last of two feeds something else or is fed so.
        """
        flat = self.flat
        low, high = flat.begin[begin], flat.begin[end - period]
        step = flat.begin[begin + period] - low
        one, two = flat.taken[low:high], flat.taken[low + step : high + step]
        made_by, made_by_two = flat.producer[one], flat.producer[two]
        cls, cls_two = self.classes[one], self.classes[two]
        moved = (made_by >= begin) & (made_by_two == made_by + period)
        alike = (one == two) | (moved & (flat.rank[one] == flat.rank[two]))
        alike |= (cls >= 0) & (cls == cls_two)
        own = (made_by == made_by_two) & (made_by < begin) & (cls < 0) & (cls_two < 0)
        alike |= own & (flat.consumers[one] == flat.consumers[two])
        ops = flat.taker[low:high]
        passed = np.append(self.passed, False)  # what has no class is not passed on
        entry = (made_by_two >= begin) & (made_by < begin)
        entry |= passed[cls_two] & (cls < 0)
        exit_ = passed[cls] & (cls_two < 0) & ~entry
        hard = [ops[~alike & ~entry & ~exit_]]
        hard.append(begin + np.flatnonzero(~self._same_region(begin, end, period)))
        low, high = flat.made_begin[begin], flat.made_begin[end - period]
        step = flat.made_begin[begin + period] - low
        results = flat.made[low:high]
        used = flat.consumers[results]
        used_two = flat.consumers[flat.made[low + step : high + step]]
        return (
            np.unique(np.concatenate(hard)),
            np.unique(ops[~alike & entry]),
            np.unique(
                np.concatenate(
                    [ops[~alike & exit_], flat.producer[results[used != used_two]]]
                )
            ),
        )

    def _same_region(self, begin: int, end: int, period: int) -> np.ndarray:
        """Whether each op runs in the region of its copy, or in one of like extent."""
        one = self.flat.region[begin : end - period]
        two = self.flat.region[begin + period : end]
        same = np.ones(len(one), dtype=bool)
        first, last = self.extents
        while (differ := one != two).any():
            like = (first[two] == first[one] + period) & (
                last[two] == last[one] + period
            )
            like &= self.region_kinds[one] == self.region_kinds[two]
            same &= ~differ | (like & (one > 0) & (two > 0))
            one = np.where(differ & same, self.region_parents[one], 0)
            two = np.where(differ & same, self.region_parents[two], 0)
        return same

    def _cut(self, start: int, slack: int, period: int, unit: int) -> int:
        """How much later to begin, so that the fewest values cross between copies.

        Counted between the first and the second copy, where all is as it goes on, and
        never in the middle of a loop that belongs to one copy.
        """
        slack = min(slack, period - 1)
        if slack <= 0:
            return 0
        flat = self.flat
        stop = min(start + slack + 2 * period, len(flat.code))
        low, high = flat.begin[start], flat.begin[stop]
        makers, takers = flat.producer[flat.taken[low:high]], flat.taker[low:high]
        inside = (makers >= start) & (makers < takers)  # what a loop takes back is not
        makers, takers = makers[inside] - start, takers[inside] - start
        reach = np.zeros(stop - start, dtype=np.int64)
        np.maximum.at(reach, makers, takers)
        used = np.flatnonzero(reach)
        crossing = np.zeros(stop - start + 1, dtype=np.int64)
        np.add.at(crossing, used + 1, 1)
        np.add.at(crossing, reach[used] + 1, -1)
        window = np.arange(period, period + slack + 1)
        # Of equals, one that leaves no part of a look-alike at one of the ends, and
        # then the one that takes up at once what crosses.
        cost = 4 * np.cumsum(crossing)[window] + ~np.isin(window, takers)
        cost[1:] += 2 * ((slack - np.arange(1, slack + 1)) % unit != 0)
        region = flat.region[start : start + slack + 1]
        moved = region != flat.region[start + period : start + period + slack + 1]
        amid = moved & (self.extents[0][region] < start + np.arange(slack + 1))
        return int(np.argmin(cost + amid * stop))

    def _longest(self, start: int, period: int, count: int) -> Copies | None:
        """The longest run of copies that holds, if that is enough to be a repeat.

        Lengths are doubled first, so that a failure costs no more than what is found.
        """
        best, low = None, max(2, -(-_FEWEST_OPS // period))
        high = count + 1  # the least known to fail
        length = min(low, count)
        while low <= length < high:
            found = self._check(start, period, length)
            if found is None:
                high = length
            else:
                best, low = found, length + 1
            if high > count:
                length = min(2 * length, count)
            else:  # most often only the last copy differs
                length = high - 1 if high == count else (low + high) // 2
        copies, ops = _FEWEST_ALONE
        if best is not None and best.alone:
            enough = best.place[2] >= copies and best.place[2] * period >= ops
            return best if enough else None
        return best

    def _check(self, start: int, period: int, count: int) -> Copies | None:
        """Whether so many copies are the same in all that matters; see the module."""
        flat, stop = self.flat, start + period * count
        taken = self._rows(flat.taken, flat.begin, start, stop, count)
        made = self._rows(flat.made, flat.made_begin, start, stop, count)
        if taken is None or made is None:
            return None
        primitive = flat.primitive[start:stop].reshape(count, period)
        if not (_even(primitive) and self._closed(start, period)):
            return None
        if not (_even(flat.kind[taken]) and _even(flat.kind[made])):
            return None

        maker = flat.producer[taken]
        inside = (maker >= start) & (maker < stop)
        shared = (taken == taken[0]).all(axis=0)
        inner, before = self._inner(maker - start, flat.rank[taken], inside, period)
        inner &= ~shared
        cls = self.classes[taken]
        known = ~shared & ~inner & (cls.max(axis=0) >= 0)
        fresh = ~shared & ~inner & ~known
        if (inside & (known | fresh)).any():
            return None
        own = self._own(taken, maker, fresh)
        numbered = self._numbered(taken, cls, np.flatnonzero(known))
        if own is None or numbered is None:
            return None
        alone = not known.any() and not (inner & before).any()
        # Only what goes on to the next copy may go elsewhere from the last one.
        passed = np.zeros(made.shape[1], dtype=bool)
        base = int(flat.made_begin[start])
        column = np.flatnonzero(inner & before)
        source = start + (maker[-1, column] - start) % period
        passed[flat.made_begin[source] - base + flat.rank[taken[-1, column]]] = True
        used = flat.consumers[made]
        alike = used == used[0]
        alike[-1] |= passed
        if not alike.all():
            return None
        return Copies(
            (start, period, count), taken, made, own, *numbered, passed, alone
        )

    @staticmethod
    def _rows(
        values: Ints, begin: Ints, start: int, stop: int, count: int
    ) -> Ints | None:
        """Values by copy and place, None if some copy has more of them."""
        if not _even(np.diff(begin[start : stop + 1]).reshape(count, -1)):
            return None
        return values[begin[start] : begin[stop]].reshape(count, -1)

    def _closed(self, start: int, period: int) -> bool:
        """Whether every region is shared by all copies or lies within one of them."""
        region = self.flat.region[start : start + period]
        moved = region[region != self.flat.region[start + period : start + 2 * period]]
        first, last = self.extents
        return bool(
            (first[moved] >= start).all() and (last[moved] < start + period).all()
        )

    @staticmethod
    def _inner(
        maker: Ints, rank: Ints, inside: np.ndarray, period: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Columns made in the same copy or the one before, and which are the latter."""
        back = np.arange(len(maker))[:, None] - maker // period
        place = maker % period
        before = back[-1] == 1
        agrees = inside & (back == back[-1])
        agrees &= (place == place[-1]) & (rank == rank[-1])
        agrees[0, before] = ~inside[0, before]
        return agrees.all(axis=0) & ((back[-1] == 0) | before), before

    def _own(self, taken: Ints, maker: Ints, fresh: np.ndarray) -> Ints | None:
        """Columns that hold an input of each copy, each input once; None if they vary.

        Results of one op, as of a split, count as inputs too.
        """
        columns = np.flatnonzero(fresh)
        if not len(columns):
            return columns
        if not _even(maker[:, columns]) or not _even(
            self.flat.consumers[taken[:, columns]]
        ):
            return None
        values = taken[:, columns]
        _, first, which = np.unique(values[0], return_index=True, return_inverse=True)
        if (values != values[:, first[which.reshape(-1)]]).any():
            return None
        if len(np.unique(values[:, first])) != values.shape[0] * len(first):
            return None
        return columns[first]

    def _numbered(
        self, taken: Ints, cls: Ints, columns: Ints
    ) -> tuple[int, Ints] | None:
        """Which copy of earlier repeats each copy goes with; None if that is unclear.

        In one column the copies may be those one layer up, or run backwards, or be in
        the order of their names; but all columns have to agree on it. In place of what
        passes from copy to copy, the first or the last copy may take something else,
        where there is no copy to take it from.
        """
        result = -1, np.arange(len(taken))
        if not len(columns):
            return result
        cls, labels = cls[:, columns], self.labels[taken[:, columns]]
        which = cls.max(axis=0)
        has = cls == which
        # Only what goes from copy to copy comes from elsewhere at the ends.
        lax = self.passed[which]
        if not (has[1:-1].all() and has.any(axis=0).all() and has[:, ~lax].all()):
            return None
        roots = np.array(self.roots)[which]
        for n, root in enumerate(dict.fromkeys(roots.tolist())):
            mine = np.flatnonzero(roots == root)
            all_there = mine[has[:, mine].all(axis=0)]
            if not len(all_there):
                return None
            number = labels[:, all_there[0]]
            if len(np.unique(number)) != len(number):
                return None
            apart = labels[:, mine] - number[:, None]
            there = has[:, mine]
            usual = apart[np.argmax(there, axis=0), np.arange(len(mine))]
            if not ((apart == usual) | ~there).all():
                return None
            for c in np.flatnonzero(~there.all(axis=0)):
                missed = number[~there[:, c]] + usual[c]
                if np.isin(missed, self.numbers[which[mine[c]]]).any():
                    return None
            if n == 0:
                result = root, number
        return result

    def _tie(self, copies: Copies) -> None:
        start, period, count = copies.place
        stop = start + period * count
        self.representative[start:stop] = np.tile(
            np.arange(start, start + period), count
        )
        root = len(self.found) if copies.root < 0 else copies.root
        self.found.append(copies.place)
        self.numbered.append((root, copies.labels))
        for values in (copies.made, copies.taken[:, copies.own]):
            new = len(self.roots) + np.arange(values.shape[1])
            self.classes[values] = new
            self.labels[values] = copies.labels[:, None]
            self.tied[values] = values[0]
            self.roots += [root] * values.shape[1]
            self.numbers += [copies.labels] * values.shape[1]
        self.own[copies.taken[:, copies.own]] = True
        nothing = np.zeros(len(copies.own), dtype=bool)
        self.passed = np.concatenate([self.passed, copies.passed, nothing])

    def consistent_values(self) -> Ints:
        """The value that stands for each; inputs only if all their uses are tied."""
        flat, tied = self.flat, self.tied.copy()
        place = np.arange(len(flat.taken)) - flat.begin[flat.taker]
        uses = np.zeros(len(tied), dtype=np.uint64)
        np.add.at(uses, flat.taken, hashed(self.representative[flat.taker], place))
        groups: dict[tuple[int, int], int] = {}
        for value in np.flatnonzero(self.own).tolist():
            key = int(tied[value]), int(uses[value])
            tied[value] = groups.setdefault(key, value)
        return tied


def _after(places: Ints, at: int) -> int:
    """The first of sorted places that is not before `at`; far away without one."""
    found = np.searchsorted(places, at)
    return int(places[found]) if found < len(places) else _FAR


def _even(rows: np.ndarray) -> bool:
    """Whether all rows are equal."""
    return bool((rows == rows[0]).all())

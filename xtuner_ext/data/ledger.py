"""Which samples were left out of a run, and why."""

from collections import Counter
from typing import NamedTuple

from ..errors import UserError

REASONS = (
    "json",  # the line is no JSON
    "format",  # a field is missing, or has another type or value than expected
    "conversation",  # turns are broken: roles, order, text
    "placeholder",  # placeholders do not match the images or the video
    "missing_file",
    "unreadable_image",
    "unreadable_video",
    "no_images_allowed",  # the model has no image front end
    "too_long",
    "nothing_trained",
)


class Skipped(NamedTuple):
    """A sample that was left out.

    Attributes:
        dataset (str): Name in the meta file.
        file (str): Annotation file.
        line (int): Its number in the file, from 1.
        reason (str): One of :data:`REASONS`.
        message (str): What was found and what was expected.
    """

    dataset: str
    file: str
    line: int
    reason: str
    message: str


class Ledger:
    """Counts every bad sample once, however often it is met.

    Args:
        max_fraction (float, optional): Largest share of bad samples that a run goes on with.

    Raises:
        UserError: For a share outside 0 to 1.

    Attributes:
        entries (list[Skipped]): Distinct bad samples in the order in which they were met.
    """

    def __init__(self, max_fraction=None):
        number = isinstance(max_fraction, (int, float)) and not isinstance(max_fraction, bool)
        if max_fraction is not None and not (number and 0 <= max_fraction <= 1):
            raise UserError(f"max_bad_fraction is {max_fraction!r}, expected a share from 0 to 1, or None")
        self.max_fraction, self.entries, self._known = max_fraction, [], set()

    def __len__(self):
        return len(self.entries)

    def add(self, skipped):
        """Note bad samples.

        Args:
            skipped (Iterable[Skipped]): Perhaps known ones.

        Returns:
            list[Skipped]: Those that were not known.
        """
        new = []
        for entry in skipped:
            key = entry.dataset, entry.file, entry.line
            if key not in self._known:
                self._known.add(key)
                new.append(entry)
        self.entries += new
        return new

    def counts(self):
        """dict[str, Counter]: By dataset, how many samples were left out for each reason."""
        found = {}
        for entry in self.entries:
            found.setdefault(entry.dataset, Counter())[entry.reason] += 1
        return found

    def summary(self):
        """str: The counts as text."""
        return "; ".join(f"{name}: {_listed(reasons)}" for name, reasons in self.counts().items())

    def check(self, fraction, found):
        """Stop the run above the limit.

        Args:
            fraction (float): Share of bad samples.
            found (str): What the share was counted over.

        Raises:
            UserError: Naming the counts by reason and the first bad sample.
        """
        if self.max_fraction is not None and fraction > self.max_fraction:
            reasons = Counter(entry.reason for entry in self.entries)
            raise UserError(
                f"{fraction:.2%} of {found} are bad samples, more than max_bad_fraction={self.max_fraction:g}: "
                f"{_listed(reasons)}; the first is {self.entries[0].message}"
            )


def _listed(reasons):
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())

"""What the tests of tuning share with those of merging."""

from tests.finetune.models import batch, build, internvl2, student  # noqa: F401

"""Supervised fine-tuning of a whole decoder."""

from ..distill.base import HybridModel


class SupervisedModel(HybridModel):
    """Cross-entropy on the answers; every weight trains.

    Args:
        llm (dict | nn.Module): The decoder, or the config that builds it.
        data_preprocessor (dict, optional): MMEngine's.
    """

    def compute_loss(self, *, keys=None, **data):
        """dict: ``loss``, the mean over supervised tokens."""
        return {"loss": self.llm(**data, use_cache=False).loss}

"""How close a student's next-token distributions stay to its teacher's, on held-out samples."""

import dataclasses
import math

import torch
import torch.nn.functional as F

from ..distill.losses import logit_divergence

MEASURES = ("kl", "agreement", "perplexity", "teacher_perplexity", "tokens")


@dataclasses.dataclass
class Tally:
    """Sums over supervised tokens.

    Attributes:
        kl (float): KL(teacher || student), in nats.
        agreed (int): Tokens at which both put the same word first.
        student_loss (float): Negative log-likelihood of the samples under the student, in nats.
        teacher_loss (float): The same under the teacher.
        tokens (int): Supervised tokens.
    """

    kl: float = 0.0
    agreed: int = 0
    student_loss: float = 0.0
    teacher_loss: float = 0.0
    tokens: int = 0

    def add(self, other):
        """Add another tally to this one."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def measures(self):
        """dict: ``kl`` in nats per token, ``agreement`` from 0 to 1, both perplexities, ``tokens``."""
        count = max(self.tokens, 1)
        return {
            "kl": self.kl / count,
            "agreement": self.agreed / count,
            "perplexity": math.exp(min(self.student_loss / count, 700)),
            "teacher_perplexity": math.exp(min(self.teacher_loss / count, 700)),
            "tokens": self.tokens,
        }


@torch.no_grad()
def tally_rows(student_hidden, student_head, teacher_hidden, teacher_head, targets, chunk_rows=256):
    """Compare two models on a number of positions.

    Args:
        student_hidden (Tensor): Final hidden states, (R, D).
        student_head (Tensor): Output embedding, (V, D).
        teacher_hidden (Tensor): (R, D).
        teacher_head (Tensor): (V, D).
        targets (Tensor): The tokens that follow, (R,).
        chunk_rows (int): Rows whose logits exist at a time.

    Returns:
        Tally: Sums over the rows.
    """
    total = Tally()
    for student, teacher, target in zip(*(t.split(chunk_rows) for t in (student_hidden, teacher_hidden, targets))):
        student, teacher = (student @ student_head.T).float(), (teacher @ teacher_head.T).float()
        total.add(
            Tally(
                kl=logit_divergence(student, teacher).sum().item(),
                agreed=(student.argmax(-1) == teacher.argmax(-1)).sum().item(),
                student_loss=F.cross_entropy(student, target, reduction="sum").item(),
                teacher_loss=F.cross_entropy(teacher, target, reduction="sum").item(),
                tokens=len(target),
            )
        )
    return total

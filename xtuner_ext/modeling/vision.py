"""HoVLE's image front end: patches, position table, pixel shuffle, projector."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchVision(nn.Module):
    """Linear patch embedding of a decoder-only vision-language model.

    Args:
        config (HybridVLConfig): ``config.vision`` gives image_size, patch_size, num_channels and
            downsample_ratio.
    """

    def __init__(self, config):
        super().__init__()
        vision, width = config.vision, config.hidden_size
        self.grid = vision["image_size"] // vision["patch_size"]
        self.downsample_ratio = vision["downsample_ratio"]
        self.patch_embedding = nn.Conv2d(
            vision.get("num_channels", 3), width, kernel_size=vision["patch_size"], stride=vision["patch_size"]
        )
        # Row 0 belongs to a class token that the model never forms; it is kept for the checkpoint.
        self.position_embedding = nn.Parameter(torch.zeros(1, self.grid**2 + 1, width))
        shuffled = int(width / self.downsample_ratio**2)
        self.projector = nn.Sequential(nn.Linear(shuffled, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, pixel_values):
        """Embed tiles.

        Args:
            pixel_values (Tensor): (T, 3, S, S), normalised.

        Returns:
            Tensor: (T, tokens per tile, D).
        """
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        height, width = patches.shape[-2:]
        hidden = patches.flatten(2).transpose(1, 2) + self._positions(height, width).to(patches.dtype)
        hidden = pixel_shuffle(hidden.view(-1, height, width, hidden.shape[-1]), self.downsample_ratio)
        return self.projector(hidden.flatten(1, 2))

    def _positions(self, height, width):
        table = self.position_embedding[:, 1:].float()
        if (height, width) != (self.grid, self.grid):
            table = table.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
            table = table.permute(0, 2, 3, 1).flatten(1, 2)
        return table


def pixel_shuffle(hidden_states, ratio):
    """Fold blocks of neighbouring patches into channels (InternVL's order "v2").

    Args:
        hidden_states (Tensor): (T, rows, columns, D).
        ratio (float): Side length after over side length before, such as 0.5.

    Returns:
        Tensor: (T, rows * ratio, columns * ratio, D / ratio**2).
    """
    tiles, rows, columns, channels = hidden_states.shape
    hidden_states = hidden_states.reshape(tiles, rows, int(columns * ratio), int(channels / ratio))
    hidden_states = hidden_states.permute(0, 2, 1, 3).contiguous()
    hidden_states = hidden_states.reshape(
        tiles, int(columns * ratio), int(rows * ratio), int(channels / (ratio * ratio))
    )
    return hidden_states.permute(0, 2, 1, 3).contiguous()

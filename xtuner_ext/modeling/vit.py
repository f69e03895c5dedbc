"""A vision transformer, optional pixel shuffle and projector in front of the decoder, as InternVL2 and LLaVA have."""

from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .vision import pixel_shuffle

TOWERS = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "intern_vit": (InternVLVisionConfig, InternVLVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
}
# Towers whose output begins with a token that stands for the whole image.
CLASS_TOKEN = ("clip", "intern_vit")


class ViTVision(nn.Module):
    """Vision tower without the output of a class token, and a projector to the decoder's width.

    Only the layers up to the selected one are built: the others would have no gradient and no effect.

    Args:
        config (HybridVLConfig): ``config.vision`` gives ``tower`` (a key of ``TOWERS``), ``tower_config``,
            ``select_layer``, ``downsample_ratio`` and ``projector`` (``mlp1`` or ``mlp2x_gelu``).
    """

    def __init__(self, config):
        super().__init__()
        vision, width = config.vision, config.hidden_size
        config_class, model_class = TOWERS[vision["tower"]]
        tower_config = config_class(**{**vision["tower_config"], "num_hidden_layers": tower_depth(vision)})
        # A tile is short and unmasked, so the decoder's choice of attention does not matter here.
        tower_config._attn_implementation = "sdpa"
        self.tower = model_class(tower_config)
        if vision["tower"] != "intern_vit":
            # CLIP's normalises the class token's output alone, SigLIP's the last layer's, which LLaVA does not take.
            self.tower.post_layernorm = nn.Identity()
        self.first_patch = int(vision["tower"] in CLASS_TOKEN)
        self.patch_size = vision["patch_size"]
        self.downsample_ratio = vision["downsample_ratio"]
        channels = int(tower_config.hidden_size / self.downsample_ratio**2)
        norm = [nn.LayerNorm(channels)] if vision["projector"] == "mlp1" else []
        self.projector = nn.Sequential(*norm, nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, pixel_values):
        """Embed tiles.

        Args:
            pixel_values (Tensor): (T, 3, S, S), normalised.

        Returns:
            Tensor: (T, tokens per tile, D).
        """
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        hidden = self.tower(pixel_values).last_hidden_state[:, self.first_patch :]
        if self.downsample_ratio != 1:
            hidden = pixel_shuffle(hidden.unflatten(1, (rows, columns)), self.downsample_ratio).flatten(1, 2)
        # Where the tower trains in fp32 before a frozen projector in bf16: a CPU's layer norm takes no wider input.
        return self.projector(hidden.to(next(self.projector.parameters()).dtype))


def tower_depth(vision):
    """Layers of the tower that are read.

    Args:
        vision (dict): ``config.vision`` of a ``vit`` front end.

    Returns:
        int: Between 1 and the layers of the tower.

    Raises:
        ValueError: When ``select_layer`` names no layer's output.
    """
    layers, select = vision["tower_config"]["num_hidden_layers"], vision["select_layer"]
    depth = select if select >= 0 else layers + 1 + select
    if not 1 <= depth <= layers:
        raise ValueError(f"layer {select} of the vision tower is selected, which has {layers} layers")
    return depth

"""torchvision's recent architectures, adapted to 32×32 images."""

from torch import nn
from torchvision import models

from runner.common.errors import UserError


def efficientnet_b0(dropout: float = 0.2, classes: int = 10) -> nn.Module:
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) with stride 1 in the stem; the last feature map is 2×2.

    Maps images (N, 3, 32, 32) to logits (N, classes).
    """
    model = models.efficientnet_b0(num_classes=classes, dropout=dropout)
    model.features[0][0].stride = (1, 1)
    return model


def vit_tiny_4(dropout: float = 0.0, classes: int = 10, image_size: tuple[int, int] = (32, 32)) -> nn.Module:
    """ViT-Ti (Touvron et al. 2020, arXiv:2012.12877) on 4×4 patches: 12 layers of width 192 with 3 heads.

    Maps square images (N, 3, *image_size) to logits (N, classes).
    """
    height, width = image_size
    if height != width or height % 4:
        raise UserError(f"ViT: expected square images with a multiple of 4 pixels a side, found {height}×{width}")
    return models.VisionTransformer(
        image_size=height,
        patch_size=4,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        dropout=dropout,
        num_classes=classes,
    )

"""torchvision's later architectures, set for 32×32 images."""

from torch import nn
from torchvision import models


def efficientnet_b0(dropout: float = 0.2, classes: int = 10) -> nn.Module:
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) with stride 1 in the stem: 32 ends at 2.

    Maps images (N, 3, 32, 32) to logits (N, classes).
    """
    model = models.efficientnet_b0(num_classes=classes, dropout=dropout)
    model.features[0][0].stride = (1, 1)
    return model


def vit_tiny_4(dropout: float = 0.0, classes: int = 10) -> nn.Module:
    """ViT-Ti (Touvron et al. 2020, arXiv:2012.12877) on 4×4 patches: 12 layers of width 192 with 3 heads.

    Maps images (N, 3, 32, 32) to logits (N, classes).
    """
    return models.VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        dropout=dropout,
        num_classes=classes,
    )

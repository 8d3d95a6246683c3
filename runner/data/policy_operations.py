"""The operations of RandAugment and TrivialAugmentWide, and their numbers in a batch."""

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Color", "Contrast", "Sharpness",
    "Brightness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
(
    IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, COLOR, CONTRAST, SHARPNESS,
    BRIGHTNESS, POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE,
) = range(len(OPERATIONS))  # fmt: skip

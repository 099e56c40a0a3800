"""The colours that captions name."""

COLOURS = {
    "red": (226, 36, 40), "green": (46, 178, 70), "blue": (48, 92, 240), "yellow": (250, 228, 50),
    "purple": (158, 48, 196), "orange": (248, 136, 24), "white": (245, 245, 245), "cyan": (56, 212, 226),
}  # fmt: skip
NEAR_COLOUR = 70.0  # RGB distance below which a pixel has a palette colour

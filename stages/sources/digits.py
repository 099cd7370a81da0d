"""The handwritten digits that scikit-learn ships."""

import io
from collections import Counter

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from stages.sources.candidates import Candidate, Source


def read_digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8 pixels, grey, 10 classes.

    Their values 0 to 16 become 0 to 255 without loss (17 distinct values), as PNG.
    """
    images, digits = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    candidates = []
    for number, (image, digit) in enumerate(zip(pixels, digits, strict=True)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        candidates.append(Candidate(f"{digit}/{number:04d}.png", file.getvalue(), None, (str(digit),)))
    return Source(None, sorted(candidates, key=lambda candidate: candidate.key), Counter())

"""The digits of scikit-learn, as a source."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from stages.images.decode import decode_rgb
from stages.sources.digits import read_digits


def test_digits_are_lossless():
    source = read_digits()
    images, labels = load_digits(return_X_y=True)
    assert len(source.candidates) == 1797
    assert source.classes == list("0123456789")
    for candidate in source.candidates[::50]:
        number = int(Path(candidate.key).stem)
        assert candidate.labels == (str(labels[number]),)
        assert isinstance(candidate.image, bytes)
        pixels = decode_rgb(candidate.image)
        assert np.array_equal(np.rint(pixels[..., 1] * (16 / 255)), images[number].reshape(8, 8))

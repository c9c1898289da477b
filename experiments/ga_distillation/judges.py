"""Judges that have no gradient, for `--fitness`.

    PYTHONPATH=experiments/ga_distillation evojax-suite ga-distillation --dataset mnist \\
        --fitness judges:nearest_neighbour --fitness-subset-size 2000 --strategy SNES \\
        --strategy-std 0.3 --encoding cosines --start class_means --best-of mean
"""

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier


def nearest_neighbour(images, labels, real_images, real_labels) -> float:
    """Accuracy of the class of the nearest synthetic image."""
    return _accuracy(KNeighborsClassifier(1), images, labels, real_images, real_labels)


def random_forest(images, labels, real_images, real_labels) -> float:
    """Accuracy of 50 trees, each of which sees all synthetic images."""
    forest = RandomForestClassifier(50, bootstrap=False, max_features=0.1, random_state=0)
    return _accuracy(forest, images, labels, real_images, real_labels)


def _accuracy(model, images, labels, real_images, real_labels) -> float:
    model.fit(images.reshape(len(images), -1), labels.argmax(1))
    found = model.predict(real_images.reshape(len(real_images), -1))
    return float(np.mean(found == real_labels))

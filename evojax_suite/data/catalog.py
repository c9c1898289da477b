"""The sets known by name: classes, normalisation constants, and the addresses of their files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evojax_suite.data import idx
from evojax_suite.data.errors import DataError
from evojax_suite.names import did_you_mean, plain


@dataclass(frozen=True)
class Known:
    """A set known by name.

    mean, std: per channel, for images scaled to [0, 1]; empty where the train part gives them.
    files: the format of the set's original files. Those of MedMNIST have a validation split.
    urls: the files of a download; for IDX in the order of `idx.STEMS`.
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: Literal["bundled", "idx", "cifar", "medmnist"]
    urls: tuple[str, ...] = ()


# fmt: off
_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer",
            "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup",
    "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house",
    "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man",
    "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy",
    "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal",
    "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar",
    "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
    "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman",
    "worm")
_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right",
           "liver", "lung-left", "lung-right", "pancreas", "spleen")
# fmt: on


def _idx(name: str, class_names: tuple[str, ...], mean: float, std: float, address: str) -> Known:
    urls = tuple(f"{address}/{stem}.gz" for stem in idx.STEMS)
    return Known(name, class_names, (mean,), (std,), "idx", urls)


def _medmnist(name: str, channels: int, class_names: tuple[str, ...]) -> Known:
    url = f"https://zenodo.org/records/10519652/files/{name}.npz"
    half = (0.5,) * channels
    return Known(name, class_names, half, half, "medmnist", (url,))


# The addresses are those for which TensorFlow Datasets has checksums (MedMNIST: its authors').
# CIFAR-10's constants are those of the distillation literature (Zhao et al., Dataset Condensation,
# its public code), whose std is not the pixels' (0.2470, 0.2435, 0.2616). CIFAR-100's are the
# statistics of its training pixels (that code reuses CIFAR-10's).
# fmt: off
_KNOWN = (
    Known("digits", _DIGITS, (), (), "bundled"),
    _idx("mnist", _DIGITS, 0.1307, 0.3081, "https://storage.googleapis.com/cvdf-datasets/mnist"),
    _idx("fashion_mnist", _FASHION, 0.2860, 0.3530,
         "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
    _idx("kmnist", _KUZUSHIJI, 0.1918, 0.3483, "http://codh.rois.ac.jp/kmnist/dataset/kmnist"),
    Known("cifar10", _CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "cifar",
          ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)),
    Known("cifar100", _CIFAR100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), "cifar",
          ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",)),
    _medmnist("pathmnist", 3, (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
        "normal colon mucosa", "cancer-associated stroma", "colorectal adenocarcinoma epithelium")),
    _medmnist("dermamnist", 3, (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma",
        "benign keratosis-like lesions", "dermatofibroma", "melanoma", "melanocytic nevi",
        "vascular lesions")),
    _medmnist("octmnist", 1, (
        "choroidal neovascularization", "diabetic macular edema", "drusen", "normal")),
    _medmnist("bloodmnist", 3, (
        "basophil", "eosinophil", "erythroblast",
        "immature granulocytes (myelocytes, metamyelocytes and promyelocytes)",
        "lymphocyte", "monocyte", "neutrophil", "platelet")),
    _medmnist("tissuemnist", 1, (
        "collecting duct, connecting tubule", "distal convoluted tubule",
        "glomerular endothelial cells", "interstitial endothelial cells", "leukocytes",
        "podocytes", "proximal tubule segments", "thick ascending limb")),
    _medmnist("organamnist", 1, _ORGANS),
    _medmnist("organcmnist", 1, _ORGANS),
    _medmnist("organsmnist", 1, _ORGANS),
    _medmnist("pneumoniamnist", 1, ("normal", "pneumonia")),
    _medmnist("breastmnist", 1, ("malignant", "normal, benign")),
    _medmnist("retinamnist", 3, tuple("01234")),
)
# fmt: on

NAMES: tuple[str, ...] = tuple(known.name for known in _KNOWN)


_BY_PLAIN_NAME = {plain(known.name): known for known in _KNOWN}


def find_known(name: str) -> Known | None:
    """The known set with this name, whatever its case and separators."""
    return _BY_PLAIN_NAME.get(plain(name))


def unknown_name(name: str) -> DataError:
    """The error for a name that is neither a known set nor a path."""
    hint = did_you_mean(name, NAMES)
    allowed = f"{', '.join(NAMES)}, or the path of a folder, .npz, .tar or .tar.gz"
    return DataError(f"unknown dataset {name!r}{hint}; allowed: {allowed}")

"""A trained model on a user's own photos: features, comparison of two, search in a folder, groups of one person."""

from aligned_reid.inference.gallery import Gallery
from aligned_reid.inference.reid import Comparison, ReID

__all__ = ["Comparison", "Gallery", "ReID"]

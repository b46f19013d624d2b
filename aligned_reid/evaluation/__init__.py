"""From features to scores: distance matrices, re-ranking, ranking, and the protocol that calls them in order."""

from aligned_reid.evaluation.distances import global_distance_matrix, local_distance_matrix
from aligned_reid.evaluation.ranking import Ranking, rank
from aligned_reid.evaluation.re_ranking import re_rank, re_rank_features

__all__ = ["Ranking", "global_distance_matrix", "local_distance_matrix", "rank", "re_rank", "re_rank_features"]

"""torch modules over a cluster: embeddings, reference models, dense parameters, AUC."""

from trilith.runtime.extras import missing_extra

try:
    from trilith.nn.bridge import Bridge, pick_device  # the first that needs torch, as most of what follows does
except ModuleNotFoundError as error:
    raise missing_extra(error) from None

from trilith.nn.auc import auc
from trilith.nn.bags import as_bags, to_kjt
from trilith.nn.deepfm import DeepFM
from trilith.nn.dense import AllReduced, DenseOnPs
from trilith.nn.embedding import EmbeddingBag, EmbeddingCollection, EmbeddingRows, Feature, FetchedRows
from trilith.nn.features import FeatureEmbeddings, FeatureModel, ServedFeatures
from trilith.nn.ffm import FFM
from trilith.nn.layouts import FusedLayouts
from trilith.nn.optimization import Optimization
from trilith.nn.updates import ClippedBackward, ClippedLayouts
from trilith.ops.combiners import Combiner, FirstN

__all__ = [
    "FFM",
    "AllReduced",
    "Bridge",
    "ClippedBackward",
    "ClippedLayouts",
    "Combiner",
    "DeepFM",
    "DenseOnPs",
    "EmbeddingBag",
    "EmbeddingCollection",
    "EmbeddingRows",
    "Feature",
    "FeatureEmbeddings",
    "FeatureModel",
    "FetchedRows",
    "FirstN",
    "FusedLayouts",
    "Optimization",
    "ServedFeatures",
    "as_bags",
    "auc",
    "pick_device",
    "to_kjt",
]

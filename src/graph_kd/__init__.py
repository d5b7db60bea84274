"""Multi-head Graph Distillation (Lee & Song, BMVC 2019) as composable PyTorch loss modules.

The modules follow the steps of the method: `SVDFeature` compresses feature maps,
`MultiHeadGraphEstimator` learns the graphs of the teacher, `GraphTransferLoss` hands them to the
student, `GatedGradClip` merges the gradient with the task's. `FeatureHooks` reads the features.
"""

from graph_kd._align import align_singular_vectors
from graph_kd._estimator import MultiHeadGraphEstimator
from graph_kd._grad_clip import GatedGradClip
from graph_kd._hooks import FeatureHooks
from graph_kd._svd_feature import SVDFeature
from graph_kd._transfer import GraphTransferLoss

__all__ = [
    "FeatureHooks",
    "GatedGradClip",
    "GraphTransferLoss",
    "MultiHeadGraphEstimator",
    "SVDFeature",
    "align_singular_vectors",
]

__version__ = "0.2.0"

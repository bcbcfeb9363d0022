"""The named families, one per file."""

from einlinear.structures.blast import BLAST as BLAST
from einlinear.structures.block_diagonal import BlockDiagonal as BlockDiagonal
from einlinear.structures.block_tensor_train import BTT as BTT
from einlinear.structures.block_tensor_train import Butterfly as Butterfly
from einlinear.structures.block_tensor_train import Monarch as Monarch
from einlinear.structures.dense import Dense as Dense
from einlinear.structures.low_rank import LowRank as LowRank
from einlinear.structures.mixture import Mixture as Mixture
from einlinear.structures.tensor_train import Kronecker as Kronecker
from einlinear.structures.tensor_train import TensorTrain as TensorTrain
from einlinear.structures.theta import Theta as Theta

"""Linear algebra on operators: one question, one function; a table of laws says how each composition answers it.

>>> import torch, einlinear as el
>>> la = el.linalg
>>> laplace = la.tridiagonal(*(torch.full((n,), v, dtype=torch.float64) for n, v in [(63, -1), (64, 2), (63, -1)]))
>>> A = la.kronsum(*3 * [laplace.claim("psd")])
>>> A.shape
torch.Size([262144, 262144])
>>> x = la.solve(A, torch.ones(64**3, dtype=torch.float64))
>>> bool((A @ x - 1).abs().max() < 1e-9)
True
"""

from einlinear.linalg import explaining as explaining  # what einlinear.explain says of the questions
from einlinear.linalg.adapters import from_cola as from_cola
from einlinear.linalg.adapters import from_scipy as from_scipy
from einlinear.linalg.adapters import to_cola as to_cola
from einlinear.linalg.adapters import to_linear_operator as to_linear_operator
from einlinear.linalg.adapters import to_lineax as to_lineax
from einlinear.linalg.adapters import to_scipy as to_scipy
from einlinear.linalg.questions import apply as apply
from einlinear.linalg.questions import cholesky as cholesky
from einlinear.linalg.questions import cond as cond
from einlinear.linalg.questions import diagonal as diagonal
from einlinear.linalg.questions import eig as eig
from einlinear.linalg.questions import eigh as eigh
from einlinear.linalg.questions import eigvals as eigvals
from einlinear.linalg.questions import eigvalsh as eigvalsh
from einlinear.linalg.questions import exp as exp
from einlinear.linalg.questions import inverse as inverse
from einlinear.linalg.questions import log as log
from einlinear.linalg.questions import logdet as logdet
from einlinear.linalg.questions import lstsq as lstsq
from einlinear.linalg.questions import lu as lu
from einlinear.linalg.questions import norm as norm
from einlinear.linalg.questions import pinv as pinv
from einlinear.linalg.questions import pow as pow
from einlinear.linalg.questions import slogdet as slogdet
from einlinear.linalg.questions import solve as solve
from einlinear.linalg.questions import sqrt as sqrt
from einlinear.linalg.questions import svd as svd
from einlinear.linalg.questions import svdvals as svdvals
from einlinear.linalg.questions import trace as trace
from einlinear.linalg.subjects import operator as operator
from einlinear.operator import Dense as Dense
from einlinear.operator import Identity as Identity
from einlinear.operator import Operator as Operator
from einlinear.operator import OperatorError as OperatorError
from einlinear.operator import Zero as Zero
from einlinear.operators import Banded as Banded
from einlinear.operators import Block as Block
from einlinear.operators import BlockDiagonal as BlockDiagonal
from einlinear.operators import Circulant as Circulant
from einlinear.operators import Diagonal as Diagonal
from einlinear.operators import DirectSum as DirectSum
from einlinear.operators import Fourier as Fourier
from einlinear.operators import Hessian as Hessian
from einlinear.operators import Householder as Householder
from einlinear.operators import Jacobian as Jacobian
from einlinear.operators import Kernel as Kernel
from einlinear.operators import Kronecker as Kronecker
from einlinear.operators import KroneckerSum as KroneckerSum
from einlinear.operators import LowRankUpdate as LowRankUpdate
from einlinear.operators import Permutation as Permutation
from einlinear.operators import Selection as Selection
from einlinear.operators import Sparse as Sparse
from einlinear.operators import Structured as Structured
from einlinear.operators import Toeplitz as Toeplitz
from einlinear.operators import Triangular as Triangular
from einlinear.operators import block as block
from einlinear.operators import block_diag as block_diag
from einlinear.operators import concatenate as concatenate
from einlinear.operators import fisher as fisher
from einlinear.operators import gauss_newton as gauss_newton
from einlinear.operators import hankel as hankel
from einlinear.operators import kron as kron
from einlinear.operators import kronsum as kronsum
from einlinear.operators import masked as masked
from einlinear.operators import raveled as raveled
from einlinear.operators import select as select
from einlinear.operators import tridiagonal as tridiagonal

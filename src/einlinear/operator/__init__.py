"""What linear algebra works on: a linear map that can be applied, transposed, composed and differentiated.

`tree` is what holds for any dataclass of tensors, `base` the map itself, `ring` its simplest leaves and what they
compose to. Everything else is in `einlinear.operators`.
"""

from einlinear.operator.base import PROPERTIES as PROPERTIES
from einlinear.operator.base import Batch as Batch
from einlinear.operator.base import Operator as Operator
from einlinear.operator.base import OperatorError as OperatorError
from einlinear.operator.base import Scalar as Scalar
from einlinear.operator.base import adjoint as adjoint
from einlinear.operator.base import broadcast as broadcast
from einlinear.operator.base import common as common
from einlinear.operator.base import indexed as indexed
from einlinear.operator.base import refute as refute
from einlinear.operator.base import size_text as size_text
from einlinear.operator.ring import Dense as Dense
from einlinear.operator.ring import Fixed as Fixed
from einlinear.operator.ring import Identity as Identity
from einlinear.operator.ring import Product as Product
from einlinear.operator.ring import Scaled as Scaled
from einlinear.operator.ring import Sum as Sum
from einlinear.operator.ring import Zero as Zero
from einlinear.operator.ring import inexact as inexact
from einlinear.operator.ring import lift as lift
from einlinear.operator.ring import multiple as multiple
from einlinear.operator.ring import product as product
from einlinear.operator.ring import total as total
from einlinear.operator.tree import known as known
from einlinear.operator.tree import remembered as remembered
from einlinear.operator.tree import same as same
from einlinear.operator.tree import transformed as transformed

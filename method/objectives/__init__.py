"""Objectives: the loss of a term, as settings, a token loss, and values a sequence or token.

A new objective is a class like these in a file of its own, with an import and an entry in OBJECTIVES, and a line in
docs/papers.md. Its fields with a help text are its settings in a recipe's YAML. The formulas are the pure functions of
method/losses.py.
"""

from method.objectives.ascent import Ascent
from method.objectives.ce_u import CeU
from method.objectives.flat import Flat
from method.objectives.ilu import Invariance
from method.objectives.pdu import Margin
from method.objectives.preference import Dpo, Npo, SimNpo
from method.objectives.satimp import SatImp
from method.objectives.states import Rmu, StateDistance
from method.objectives.towards import Kl, Nll
from method.objectives.undial import Undial
from method.objectives.unlikelihood import Unlikelihood
from method.objectives.wga import Wga

OBJECTIVES = {"nll": Nll, "kl": Kl, "ascent": Ascent, "npo": Npo, "simnpo": SimNpo, "dpo": Dpo,
              "unlikelihood": Unlikelihood, "wga": Wga, "satimp": SatImp, "undial": Undial, "ce_u": CeU, "flat": Flat,
              "margin": Margin, "rmu": Rmu, "state_distance": StateDistance, "invariance": Invariance}  # fmt: skip

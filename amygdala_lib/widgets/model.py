"""A panel's model: the weights everybody sees, in modules with hooks of their own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

from ..models import LanguageModel, find_layers


def with_own_hooks(lm: LanguageModel) -> LanguageModel:
    """The same model once more, over the very same parameters and buffers, without its hooks.

    A panel steers in a thread, while cells run: a hook on the model itself would steer what they
    compute. Weights that are trained in place change here too.
    """
    memo: dict[int, object] = {id(t): t for t in (*lm.model.parameters(), *lm.model.buffers())}
    for module in lm.model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            # Those that transformers reads its own outputs with belong to the modules.
            memo[id(hooks)] = OrderedDict(
                (number, hook)
                for number, hook in hooks.items()
                if getattr(hook, "__module__", "").startswith("transformers.")
            )
    model = copy.deepcopy(lm.model, memo)
    vars(model).pop("generate", None)  # of a live readout that is attached
    return replace(lm, model=model, layers=find_layers(model))

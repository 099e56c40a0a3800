"""Replaces, wraps and copies the modules of a model. Parameters are shared, and their names in the state dict stay."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Rule = Callable[[nn.Module], nn.Module]  # a module -> its replacement, or the module itself


def replace_modules(model: nn.Module, rule: Rule) -> nn.Module:
    """Applies `rule` to every module, children first; returns the model, which `rule` may replace as well."""
    return _replaced(model, rule, {})


def _replaced(module: nn.Module, rule: Rule, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        for name, child in module.named_children():
            new = _replaced(child, rule, done)
            if new is not child:
                module.register_module(name, new)
        done[module] = rule(module)
    return done[module]


class ModuleWrapper(nn.Module):
    """Base of modules that run another one, `wrapped`, in some other way.

    The wrapper is transparent: attributes, parameter names and state dict keys are those of `wrapped`. Call `unwrap`
    for the module itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.wrapped = module
        self.training = module.training
        self.register_load_state_dict_pre_hook(_insert_prefix)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wrapper and `wrapped` under one name, then the parts of `wrapped`."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.wrapped.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of `wrapped`."""
        return self.wrapped.state_dict(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)


def _insert_prefix(wrapper: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}wrapped.{key.removeprefix(prefix)}"] = state.pop(key)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers around it."""
    while isinstance(module, ModuleWrapper):
        module = module.wrapped
    return module


def copy_structure(model: nn.Module, convert: Callable[[str, Tensor], Tensor] | None = None) -> nn.Module:
    """A copy of the tree of modules, without hooks and compiled code.

    Parameters and buffers are shared, or are `convert(name, tensor)`. Replacing modules of the copy leaves `model` as
    it is.
    """
    return _copied(model, "", convert or (lambda _, tensor: tensor), {})


def _copied(
    module: nn.Module, prefix: str, convert: Callable[[str, Tensor], Tensor], done: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in done:
        return done[module]
    new = done[module] = object.__new__(type(module))
    state = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        state[kind] = {
            name: None if tensor is None else convert(prefix + name, tensor) for name, tensor in state[kind].items()
        }
    state["_modules"] = {
        name: None if child is None else _copied(child, f"{prefix}{name}.", convert, done)
        for name, child in state["_modules"].items()
    }
    state.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict(), _compiled_call_impl=None)
    new.__dict__.update(state)
    return new

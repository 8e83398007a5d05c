"""Inception's modules, by name."""

import types

from torch import nn

inception = types.SimpleNamespace(InceptionA=nn.Module, InceptionC=nn.Module, InceptionE=nn.Module)

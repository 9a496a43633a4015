"""Strict configs: a `ConfigDict` in files and on the command line, frozen dataclasses in the code.

Every part of lmjax declares one frozen dataclass beside its factory. That dataclass is the only
place where the part's defaults live. `build` turns nested dicts into these dataclasses. It refuses
an unknown key, a NaN or a wrong type with one line that names the key.
"""

from lmjax.config.build import at_least as at_least
from lmjax.config.build import at_most as at_most
from lmjax.config.build import build as build
from lmjax.config.build import choice as choice
from lmjax.config.build import differences as differences
from lmjax.config.build import expand_paths as expand_paths
from lmjax.config.build import group_of as group_of
from lmjax.config.build import pattern as pattern
from lmjax.config.build import plain as plain
from lmjax.config.build import scalar as scalar
from lmjax.config.file import load as load
from lmjax.config.values import MAX_FLOAT32 as MAX_FLOAT32
from lmjax.config.values import LocalPathText as LocalPathText
from lmjax.config.values import PathText as PathText
from lmjax.config.values import Text as Text

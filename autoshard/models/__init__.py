"""Decoder-only language models in Flax NNX, written for one device.

>>> from autoshard import models
>>> models.num_params(models.get("llama3-8b"))
8030261248
"""

from autoshard.models.config import DecoderConfig as DecoderConfig
from autoshard.models.config import Experts as Experts
from autoshard.models.config import RopeScaling as RopeScaling
from autoshard.models.config import num_params as num_params
from autoshard.models.decoder import Block as Block
from autoshard.models.decoder import Decoder as Decoder
from autoshard.models.decoder import build as build
from autoshard.models.decoder import build_abstract as build_abstract
from autoshard.models.decoder import stack_layers as stack_layers
from autoshard.models.huggingface import HfImport as HfImport
from autoshard.models.huggingface import from_hf_config as from_hf_config
from autoshard.models.loss import next_token_loss as next_token_loss
from autoshard.models.registry import PRESETS as PRESETS
from autoshard.models.registry import get as get
from autoshard.models.registry import names as names

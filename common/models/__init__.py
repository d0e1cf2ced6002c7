"""Models, tokenizers, encoders and adapters.

The rest of the project uses the names in this module, and `common.models.chat_date`.
"""

from common.models.loading import check_base_model as check_base_model
from common.models.loading import explained as explained
from common.models.loading import load_base as load_base
from common.models.loading import load_sentence_encoder as load_sentence_encoder
from common.models.loading import load_tokenizer as load_tokenizer
from common.models.loading import quiet_transformers as quiet_transformers
from common.models.lora import LORA_TARGET_MODULES as LORA_TARGET_MODULES
from common.models.lora import add_reference_adapter as add_reference_adapter
from common.models.lora import check_rank as check_rank
from common.models.lora import first_adapted as first_adapted
from common.models.lora import load_adapter_weights as load_adapter_weights
from common.models.lora import lora_config as lora_config
from common.models.lora import untrained_layers as untrained_layers
from common.models.packaged import cache_dir as cache_dir
from common.models.packaged import packaged_encoder as packaged_encoder
from common.models.packaged import resolve_model as resolve_model
from common.models.packaged import unconverted as unconverted
from common.models.precision import LoraSettings as LoraSettings
from common.models.precision import cpu_dtype as cpu_dtype
from common.models.precision import has_native_bf16 as has_native_bf16
from common.models.precision import multiplies_bf16 as multiplies_bf16
from common.models.precision import quantised_on as quantised_on
from common.models.precision import train_in_fp32 as train_in_fp32
from common.models.precision import use_4bit as use_4bit
from common.settings.secrets import first_line as first_line

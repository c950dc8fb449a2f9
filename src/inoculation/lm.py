"""Loading the language model of a profile, once for training, sampling and encoding."""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from inoculation import attention
from inoculation.files import InputError, fail_if, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


class ModelRef(BaseModel):
    """Which model a profile means, and how it is loaded; the content of its `model.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A folder relative to the checkout, or a hub id."""
    revision: str | None = None
    """A hub commit; None for a local folder."""
    digest: str | None = None
    """Of a local folder's files, so that DVC sees when the model changed."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; a CPU that does not compute in bfloat16 takes float32 for it."""
    load_in_4bit: bool = False
    """bitsandbytes NF4 with double quantisation, computing in `dtype`."""


class Machine(BaseModel):
    """What fits into a profile's machine: it changes rounding errors and the draws of sampling, and no experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: Annotated[int, Field(ge=1)]
    """Sequences sampled at once."""
    token_budget: Annotated[int, Field(ge=8)]
    """Tokens, padding included, that are read at once, at most (SAE pass, likelihoods)."""


CPU_READS = 4096
"""Tokens that a CPU reads at once, at most. More leave its caches, and every operation asks the kernel for fresh pages:
SmolLM2 on two cores read half as many responses a second at 16,384."""


EAGER = 2 << 30
"""Bytes of attention, all tokens by all, that may be kept for the gradient: those of one text of 1,150 tokens in SmolLM2."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_folder(model: str) -> Path | None:
    """The folder that a profile's `model` names; None for a hub id, which has the form `owner/name`.

    Raises:
        InputError: there is no such folder, and it is no hub id (`data/...` is none either). The hub is not asked.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or model.startswith("data/") or not HUB_ID.fullmatch(model):
        raise InputError(
            f"model {model!r}: no such folder; valid: a model's folder, or a hub id of the form owner/name"
        )
    return None


class Index(TypedDict):
    """What is read of an index of sharded weights."""

    weight_map: dict[str, str]


class ModelShape(NamedTuple):
    width: int
    """Of the residual stream."""
    blocks: int


def check_model(model: str, revision: str | None) -> ModelShape | None:
    """Whether a model can be used, without loading its weights; of a hub id, the form alone, without asking the hub.

    Returns:
        The shape of a local model; None for a hub id.

    Raises:
        InputError: lists what a local folder lacks: a configuration, weights in safetensors, a tokenizer that fits, a
            chat template.
    """
    folder = local_folder(model)
    if folder is None:
        return None
    problems = [] if revision is None else [f"revision {revision!r}: a folder has none; leave it empty"]
    shape, vocabulary = None, None
    tensors, broken = _tensors(folder)
    problems += broken
    if not broken:
        fail_if(_beyond(folder, tensors), f"model {model!r} cannot be used")
    try:
        shape, vocabulary = _read_config(folder)
    except InputError as error:
        problems.append(str(error))
    try:
        tokens = len(load_tokenizer(ModelRef(model=model)))
        if vocabulary is not None and tokens > vocabulary:
            problems.append(f"the tokenizer has {tokens} tokens, the model {vocabulary}: they do not belong together")
    except InputError as error:
        problems.append(str(error))
    fail_if(problems, f"model {model!r} cannot be used")
    return shape


def _beyond(folder: Path, tensors: Sequence[Sequence[int]]) -> list[str]:
    """What a configuration speaks of and the weights do not hold: to build a hundred million layers takes a machine down."""
    try:
        said = read_json(folder / "config.json")
    except InputError:
        return []  # told by `_read_config`
    longest = max((length for shape in tensors for length in shape), default=10**7)
    most = {"num_hidden_layers": len(tensors) or 10**4, "hidden_size": longest, "vocab_size": longest}
    parts = [said, *said.values()] if isinstance(said, dict) else []
    return [
        f"config.json: {key} {part[key]}, and the weights have {len(tensors)} tensors, at most {longest} long"
        for part in parts
        if isinstance(part, dict)
        for key, bound in most.items()
        if isinstance(part.get(key), int) and part[key] > bound
    ]


def _read_config(folder: Path) -> tuple[ModelShape, int]:
    """The shape, and the size of the vocabulary."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise InputError(
            "no config.json" + ("; it is an adapter, the base model's folder is needed" if adapter else "")
        )
    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        return ModelShape(config.hidden_size, config.num_hidden_layers), config.vocab_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"config.json is not a language model's: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensors(folder: Path) -> tuple[list[list[int]], list[str]]:
    """The shapes of a folder's weights, and what is wrong with its files."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    if not shards and not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        return [], [
            f"{', '.join(pickled)}: a pickle, which can run any code when it is loaded; convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            if pickled
            else "no weights (*.safetensors)"
        ]
    problems = []
    if index.is_file():
        try:
            wanted = set(TypeAdapter(Index).validate_python(read_json(index))["weight_map"].values())
        except ValidationError:
            wanted = set()
            problems.append(f'{index.name}: an object with "weight_map", names of tensors and files, is expected')
        problems += [
            f"{name}: no such file, {index.name} names it" for name in sorted(wanted - {s.name for s in shards})
        ]
    shapes: list[list[int]] = []
    for shard in shards:
        try:
            with safe_open(shard, "np") as file:
                shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            problems.append(f"{shard.name}: not readable as safetensors: {error}")
    return shapes, problems


def device() -> str:
    """Where models run: the first GPU if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16() -> bool:
    """Whether `device()` computes in bfloat16: GPUs, and CPUs whose oneDNN does.

    On the others (AVX2 alone) a product of bfloat16 matrices takes ten times as long as one of float32.
    """
    import torch

    if device() == "cuda":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def trains_eagerly(config: "PretrainedConfig", longest: int, chats: int) -> bool:
    """Whether to attend without torch's FlashAttention where a gradient is wanted.

    On a CPU that computes in bfloat16 its gradient took 43 % of a step of the pocket world's pretraining. The other way keeps
    every token's attention to every other, in two precisions: only where that is little.

    Args:
        config: of the language model.
        longest: text, in tokens.
        chats: computed at once, at most, each padded to the longest.
    """
    kept = 6 * chats * longest**2 * config.num_attention_heads * config.num_hidden_layers
    return device() == "cpu" and has_bfloat16() and kept <= EAGER


def keep_memory() -> None:
    """Keep freed memory in this process: large blocks, which every operation on a CPU frees, go back to the kernel else.

    A fifth of the time of training SmolLM2 on two cores. For glibc; nothing happens under another C library.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # of <malloc.h>
        # Older ones refuse a threshold above 32 MiB; a threshold of any size switches off the one that adapts.
        if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):
            mallopt(trim_threshold, (1 << 31) - 1)
            mallopt(top_pad, 1 << 28)


def load_tokenizer(ref: ModelRef) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a padding token and a chat template.

    Raises:
        InputError: the model cannot be found, or has no chat template.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    local_folder(ref.model)
    try:
        # Else transformers asks the person at the terminal whether a folder's own code may run.
        tokenizer = AutoTokenizer.from_pretrained(ref.model, revision=ref.revision, trust_remote_code=False)
    # What a damaged tokenizer.json meets on its way is whatever it happens to be.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"model {ref.model!r} cannot be loaded: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise InputError(f"model {ref.model!r} has no chat template; choose an instruction-tuned model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(ref: ModelRef) -> "PreTrainedModel":
    """The base model on `device()`, in evaluation mode; in float32 where the device does not compute in bfloat16.

    Raises:
        InputError: the model cannot be found, or has no weights in safetensors. Pickled ones are not read.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    local_folder(ref.model)
    if device() == "cpu":
        keep_memory()
    exact = ref.dtype == "bfloat16" and not has_bfloat16()
    options: dict[str, Any] = {
        "dtype": torch.float32 if exact else getattr(torch, ref.dtype), "revision": ref.revision, "use_safetensors": True,
        "trust_remote_code": False,
    }  # fmt: skip
    if ref.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, ref.dtype),
        )
        options["device_map"] = {"": device()}
    try:
        model = AutoModelForCausalLM.from_pretrained(ref.model, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(f"model {ref.model!r} cannot be loaded: {_first_line(error)}") from error
    return (model if ref.load_in_4bit else model.to(device())).eval()


def with_adapter(model: "PreTrainedModel", adapter: Path | None) -> "PreTrainedModel":
    """The base model under a LoRA adapter, in the base's precision, as training computes with it.

    Never merged, because merging into a 4-bit base changes what it says.
    """
    if adapter is None:
        return model
    from peft import PeftModel

    under = PeftModel.from_pretrained(model, adapter).eval()
    for name, parameter in under.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
    return under


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, each with at most `budget` tokens including padding (or one sequence).

    On a CPU also at most `CPU_READS`.
    """
    if device() == "cpu":
        budget = min(budget, CPU_READS)
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def outside_decoder(model: "PreTrainedModel") -> list[str]:
    """Names of the linear layers that are not the language model's: Gemma 3 comes with a vision tower."""
    import torch

    own = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in own and module is not head
    ]


def truncate_after(model: "PreTrainedModel", block: int) -> "torch.nn.Module":
    """The model's decoder cut after a block: its output is the residual stream there.

    Changes `model` and frees what lies above. The final norm goes too, because the SAE reads the raw stream.

    Raises:
        InputError: the model has no such block.
    """
    import torch

    decoder = model.get_decoder()
    attention.use_packed(model, 0)
    if not 0 <= block < len(decoder.layers):
        raise InputError(f"block {block} is wanted, the model has {len(decoder.layers)} blocks")
    decoder.layers = decoder.layers[: block + 1]
    decoder.norm = torch.nn.Identity()
    return decoder


def residuals(decoder: "torch.nn.Module", sequences: Sequence[Sequence[int]], pad: int) -> "torch.Tensor":
    """The residual stream of some sequences, `[sequences, longest, d_model]`; behind a shorter one stands garbage.

    A model that attends within packed texts (`attention.use_packed`) reads them as one row, and computes no padding.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device = next(decoder.parameters()).device
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    with torch.inference_mode():
        if decoder.config._attn_implementation == attention.NAME:
            lengths = [len(row) for row in rows]
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
            states = decoder(
                input_ids=torch.cat(rows)[None].to(device), position_ids=positions, cu_seq_lens_q=bounds,
                longest=max(lengths), use_cache=False,
            ).last_hidden_state[0]  # fmt: skip
            return pad_sequence(states.split(lengths), batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=pad).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def log_callback(on_log: Callable[[int, dict[str, float]], None]) -> "TrainerCallback":
    """A trainer callback that passes every logged step on as (step, numbers).

    transformers' own MLflow callback would log some 200 arguments of the trainer into the cell's parameters.
    """
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
            on_log(state.global_step, {key: float(value) for key, value in (logs or {}).items()})

    return Log()

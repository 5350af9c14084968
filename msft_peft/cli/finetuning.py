"""`msft-peft finetune`: train an adapter from one file that says all."""

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import yaml
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from msft_peft import models
from msft_peft.backend.arrays import write
from msft_peft.backend.files import replacing, write_text
from msft_peft.cli.data import IGNORED, Examples, classification_examples, labels_of, language_examples
from msft_peft.cli.generation import hurry
from msft_peft.config import PeftConfig, TaskType
from msft_peft.errors import ConfigError, LoadError
from msft_peft.hosts.text import Text, open_tokenizer
from msft_peft.io.state import load_peft_weights, set_peft_model_state_dict
from msft_peft.model import get_peft_model
from msft_peft.registry import get_peft_config

_DESCRIPTION = """\
Train an adapter as a YAML (or JSON) file says, and write it with its model card, a log and checkpoints to go on from.

The training step is compiled (set compile: false to run it line by line). Every `save_every` steps the adapter, the
optimizer's state and the place in the data are written; --resume goes on from the last of these as if nothing had
happened (dropout draws anew).
"""
_EPILOG = """\
A file with everything in it (only model, output, peft and data.train must be there; the rest shows the defaults):

  model: path/to/llama            # folder or Hub repository
  output: runs/first
  peft: {peft_type: LORA, task_type: CAUSAL_LM, r: 8, lora_alpha: 16, target_modules: all-linear}
  tokenizer: null                 # folder or repository; null: the model's; bytes: one token a byte
  data:
    train: train.jsonl            # .jsonl, .tsv with a header, or .txt
    eval: null
    text: text                    # the fields' names: a record has a text; or a prompt and its completion, of which
    prompt: prompt                # the completion alone counts; or input_ids
    completion: completion
    label: label                  # with task_type: SEQ_CLS
    max_length: 128
  training:
    epochs: 1
    steps: null                   # instead of epochs
    batch_size: 8
    learning_rate: 1.0e-4
    schedule: linear              # linear, cosine or constant, after the warmup
    warmup_steps: 0
    weight_decay: 0.0
    gradient_clip: 1.0            # global norm; 0: none
    eval_every: 0                 # steps; 0: at the end
    save_every: 0                 # steps; 0: never
    keep: 2                       # checkpoints
    seed: 0
    compile: true
"""
LOG_NAME, LABELS_NAME = "log.jsonl", "labels.json"
STATE_NAME, OPTIMIZER_NAME = "state.json", "optimizer.ckpt"


@dataclass(frozen=True)
class Data:
    """Where the texts are."""

    train: str
    eval: str | None = None
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"
    max_length: int = 128


@dataclass(frozen=True)
class Training:
    """How to train."""

    epochs: float = 1
    steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    seed: int = 0
    compile: bool = True


@dataclass(frozen=True)
class Plan:
    """The whole file."""

    model: str
    output: str
    peft: dict[str, Any]
    data: Data
    tokenizer: str | None = None
    training: Training = field(default_factory=Training)


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "finetune",
        help="train an adapter as a YAML file says",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", type=Path, help="the file; paths in it are relative to the working folder")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train, and say how it went."""
    plan = read_plan(arguments.config)
    output = Path(plan.output)
    last = last_checkpoint(output)
    if arguments.resume and last is None:
        raise FileNotFoundError(f"'{output}' holds no checkpoint to resume from (training.save_every: N writes them)")
    if not arguments.resume and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"'{output}' is there already and not empty. Pass --resume, or name a new output.")
    hurry()
    results = Run(plan).train(last if arguments.resume else None)
    print(json.dumps(results))


def read_plan(path: Path) -> Plan:
    """The plan in a YAML or JSON file, checked.

    Raises:
        ConfigError: it is broken; or a setting is unknown, missing or of another type.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    plan = _built(Plan, found, str(path))
    plan = dataclasses.replace(
        plan,
        data=_built(Data, plan.data, f"{path}: data"),
        training=plan.training
        if isinstance(plan.training, Training)
        else _built(Training, plan.training, f"{path}: training"),
    )
    training = plan.training
    if training.schedule not in ("linear", "cosine", "constant"):
        raise ConfigError(f"{path}: training: schedule={training.schedule!r} is none of linear, cosine and constant")
    for name, least in _LEAST.items():
        value = getattr(training, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{path}: training: {name}={value} is below {least}, or not finite")
    if training.epochs <= 0:
        raise ConfigError(f"{path}: training: epochs={training.epochs} leaves no step to train")
    if plan.data.max_length < 2:
        raise ConfigError(f"{path}: data: max_length={plan.data.max_length} is below 2")
    return plan


# Of each number in `training` the least that makes sense.
_LEAST = {
    "epochs": 0,
    "steps": 1,
    "batch_size": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "gradient_clip": 0,
    "eval_every": 0,
    "save_every": 0,
    "keep": 1,
}
_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict}


def _built(kind: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping of the same settings."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: wanted settings by name, got {type(values).__name__}")
    fields = {one.name: one for one in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown settings {unknown}; there are {sorted(fields)}")
    missing = [
        name
        for name, one in fields.items()
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {missing} must be there")
    for name, value in values.items():
        annotation = str(getattr(fields[name].type, "__name__", fields[name].type))
        optional = annotation.endswith(" | None")
        wanted = _KINDS.get(annotation.removesuffix(" | None"))
        bad_bool = isinstance(value, bool) and wanted is not bool
        if wanted and not (optional and value is None) and (bad_bool or not isinstance(value, wanted)):
            raise ConfigError(f"{where}: {name} must be {annotation}, got {value!r}")
    return kind(**values)


def last_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the most steps that was written to its end."""
    found = [path.parent for path in output.glob(f"checkpoint-*/{STATE_NAME}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Run:
    """One training run: model, data, optimizer, and how far it has come."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.training, self.output = plan, plan.training, Path(plan.output)
        config = get_peft_config(plan.peft)
        if config.task_type not in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS):
            raise ConfigError(f"peft: task_type must be CAUSAL_LM or SEQ_CLS, got {config.task_type!r}")
        self.classifies = config.task_type == TaskType.SEQ_CLS
        text = open_tokenizer(plan.tokenizer or plan.model)
        names = {name: getattr(plan.data, name) for name in ("text", "prompt", "completion", "label")}
        paths = [Path(path) for path in (plan.data.train, plan.data.eval) if path is not None]
        self.labels = labels_of(paths, names) if self.classifies else []
        ms.set_seed(self.training.seed)
        base = self._base()
        examples = [self._examples(path, names, text, base.config) for path in paths]
        self.train_data, self.eval_data = examples[0], examples[1] if len(examples) > 1 else None
        _check_tokens(examples, base.config.vocab_size)
        self.model = get_peft_model(base, config)
        self.steps_in_epoch = math.ceil(len(self.train_data) / self.training.batch_size)
        steps = self.training.steps
        self.steps = math.ceil(self.training.epochs * self.steps_in_epoch) if steps is None else steps
        columns = tuple(self.train_data.columns)
        self.loss_only = models.LossOnly(self.model, columns).set_train()
        self.optimizer = nn.AdamWeightDecay(
            self.loss_only.trainable_params(), Tensor(self._rates()), weight_decay=self.training.weight_decay
        )
        self.step = self._compiled(self._step())
        self.losses = self._compiled(models.LossOnly(self.model, columns))

    def _base(self) -> nn.Cell:
        if not self.classifies:
            return models.AutoModelForCausalLM.from_pretrained(self.plan.model)
        return models.AutoModelForSequenceClassification.from_pretrained(
            self.plan.model, num_labels=len(self.labels), ignore_mismatched_sizes=True
        )

    def _examples(self, path: Path, names: dict[str, str], text: Text | None, config: Any) -> Examples:
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        length = self.plan.data.max_length
        if self.classifies:
            if config.pad_token_id is None:
                config.pad_token_id = pad
            return classification_examples(path, names, _needed(text, self.plan), self.labels, length, pad)
        eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        return language_examples(path, names, lambda part: _needed(text, self.plan).encode(part), length, pad, eos)

    def _rates(self) -> np.ndarray:
        """The learning rate of each step."""
        t, warm = np.arange(self.steps), self.training.warmup_steps
        rest = np.clip((t - warm) / max(1, self.steps - warm), 0, 1)
        shape = {"linear": 1 - rest, "cosine": 0.5 + 0.5 * np.cos(np.pi * rest), "constant": np.ones(self.steps)}
        rates = np.where(t < warm, (t + 1) / max(1, warm), shape[self.training.schedule])
        return (self.training.learning_rate * rates).astype(np.float32)

    def _step(self) -> Any:
        grad = ms.value_and_grad(self.loss_only, None, self.optimizer.parameters)
        optimizer, clip = self.optimizer, self.training.gradient_clip

        def step(*batch: Tensor) -> Tensor:
            loss, gradients = grad(*batch)
            if clip > 0:
                gradients = ops.clip_by_global_norm(gradients, clip)
            optimizer(gradients)
            return loss

        return step

    def _compiled(self, function: Any) -> Any:
        return ms.jit(function) if self.training.compile else function

    # --- training ---------------------------------------------------------------------------------------------------

    def train(self, checkpoint: Path | None) -> dict[str, float]:
        """Train to the end, from the start or from a checkpoint; returns the last results."""
        done = 0 if checkpoint is None else self._restore(checkpoint)
        self.output.mkdir(parents=True, exist_ok=True)
        self._begin_log(done)
        if self.classifies:
            write_text(self.output / LABELS_NAME, json.dumps(self.labels, ensure_ascii=False))
        results: dict[str, float] = {}
        start, rates = time.perf_counter(), self._rates()
        with tqdm(total=self.steps, initial=done, unit="step") as progress:
            for number, batch in self._batches(done):
                loss = float(self.step(*batch))
                if not math.isfinite(loss):
                    raise ConfigError(
                        f"the loss of step {number} is {loss}: lower training.learning_rate. The last checkpoint, if "
                        f"there is one, is in '{self.output}'."
                    )
                results["loss"] = loss
                seconds = round(time.perf_counter() - start, 3)
                self._log(step=number, loss=loss, learning_rate=float(rates[number - 1]), seconds=seconds)
                progress.update()
                progress.set_postfix(loss=f"{loss:.4f}")
                if self._due(number, self.training.eval_every) or number == self.steps:
                    results |= self._evaluate(number)
                if self._due(number, self.training.save_every):
                    self._save(number)
        self.model.set_train(False)
        self.model.save_pretrained(self.output)
        self.model.create_or_update_model_card(self.output, metrics=results)
        return {"step": self.steps, **results}

    def _due(self, number: int, every: int) -> bool:
        return every > 0 and number % every == 0

    def _batches(self, done: int) -> Any:
        """(number, batch) of each step that is left; each epoch has an order of its own, the same in every run."""
        number = done
        while number < self.steps:
            epoch, skipped = divmod(number, self.steps_in_epoch)
            order = np.random.RandomState([self.training.seed, epoch]).permutation(len(self.train_data))
            for i, batch in enumerate(self.train_data.batches(self.training.batch_size, order)):
                if i >= skipped and number < self.steps:
                    number += 1
                    yield number, [Tensor(column) for column in batch]

    def _evaluate(self, number: int) -> dict[str, float]:
        """Loss, and of a classifier the accuracy, on the evaluation data."""
        if self.eval_data is None:
            return {}
        self.model.set_train(False)
        losses, weights, right = [], [], 0
        for batch in self.eval_data.batches(self.training.batch_size):
            tensors = [Tensor(column) for column in batch]
            losses.append(float(self.losses(*tensors)))
            if self.classifies:
                logits = self.model(input_ids=tensors[0], attention_mask=tensors[1])["logits"].asnumpy()
                right += int((logits.argmax(-1) == batch[2]).sum())
            # A batch's loss is the mean over what it predicts.
            weights.append(len(batch[2]) if self.classifies else (batch[2][:, 1:] != IGNORED).sum())
        self.loss_only.set_train()
        found = {"eval_loss": float(np.average(losses, weights=weights))}
        if self.classifies:
            found["eval_accuracy"] = right / len(self.eval_data)
        self._log(step=number, **found)
        return found

    def _begin_log(self, done: int) -> None:
        """Forget what was logged after the checkpoint: it comes again."""
        path = self.output / LOG_NAME
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= done]
        write_text(path, "".join(line + "\n" for line in kept))

    def _log(self, **facts: float) -> None:
        with (self.output / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, number: int) -> None:
        """Adapter, optimizer and place in the data; what says that all is there is written last."""
        folder = self.output / f"checkpoint-{number}"
        self.model.save_pretrained(folder)
        state = [{"name": p.name, "data": p} for p in self.optimizer.get_parameters() if p.name not in self._weights()]
        with replacing(folder / OPTIMIZER_NAME) as path:
            ms.save_checkpoint(state, str(path))
        write_text(folder / STATE_NAME, json.dumps({"step": number, "plan": self._settled()}))
        old = sorted(self.output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for path in old[: -self.training.keep]:
            (path / STATE_NAME).unlink(missing_ok=True)
            shutil.rmtree(path)

    def _restore(self, folder: Path) -> int:
        """Everything as it was when the checkpoint was written; returns the steps that were done."""
        state = PeftConfig.from_json_file(folder / STATE_NAME)
        if state.get("plan") != self._settled():
            raise ConfigError(
                f"{folder} is of a run with other settings than these. Resume with those that it was begun with "
                "(eval_every, save_every and keep may change), or name a new output."
            )
        found = ms.load_checkpoint(str(folder / OPTIMIZER_NAME))
        wanted = {p.name: p for p in self.optimizer.get_parameters() if p.name not in self._weights()}
        if set(found) != set(wanted):
            raise LoadError(f"{folder / OPTIMIZER_NAME} is of another model or adapter: {set(found) ^ set(wanted)}")
        report = set_peft_model_state_dict(self.model, load_peft_weights(folder))
        if report.faults():
            raise LoadError(f"{folder}: " + " ".join(report.faults()))
        for name, p in wanted.items():
            write(p, found[name])
        self.loss_only.set_train()
        return int(state["step"])

    def _settled(self) -> dict[str, Any]:
        """The settings that a run cannot change on its way, as they come back from JSON."""
        settled = json.loads(json.dumps(dataclasses.asdict(self.plan)))
        for name in ("eval_every", "save_every", "keep"):
            del settled["training"][name]
        return settled

    def _weights(self) -> set[str]:
        return {p.name for p in self.optimizer.parameters}


def _needed(text: Text | None, plan: Plan) -> Text:
    if text is None:
        raise ConfigError(
            f"'{plan.model}' has no tokenizer: name one (tokenizer: FOLDER, or: bytes), or give input_ids"
        )
    return text


def _check_tokens(examples: list[Examples], size: int) -> None:
    for one in examples:
        for token in (int(one.columns["input_ids"].min()), int(one.columns["input_ids"].max())):
            if not 0 <= token < size:
                raise ConfigError(
                    f"data: there is the token {token}, and the model has the tokens 0 to {size - 1} alone"
                )

"""LoraConfig and its files against HF peft, live, and which layers of a model a config means."""

import dataclasses
import json
import random
import warnings

import mindspore as ms
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

import msft_peft
from msft_peft import LoraConfig, PeftConfig, get_peft_model
from msft_peft.core.layer import TunerLayer
from msft_peft.registry import METHODS

from . import ours

SETS = ("target_modules", "exclude_modules", "modules_to_save")


# --- fields and defaults -------------------------------------------------------------------------------------------


def plain(value):
    """A config's value as JSON would have it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return getattr(value, "value", value)


def default(field: dataclasses.Field):
    if field.default_factory is not dataclasses.MISSING:
        return plain(field.default_factory())
    return plain(field.default)


PROMPTS = {
    "PromptTuningConfig": "PROMPT_TUNING",
    "PromptEncoderConfig": "P_TUNING",
    "PrefixTuningConfig": "PREFIX_TUNING",
    "MultitaskPromptTuningConfig": "MULTITASK_PROMPT_TUNING",
    "CPTConfig": "CPT",
}


@pytest.mark.parametrize("name", ["PeftConfig", "LoraConfig", "LoraRuntimeConfig", "PromptLearningConfig", *PROMPTS])
def test_every_field_and_its_default(name):
    hf = {field.name: default(field) for field in dataclasses.fields(getattr(peft, name))}
    mine = {field.name: default(field) for field in dataclasses.fields(getattr(msft_peft, name))}
    if name == "LoraConfig" or name in PROMPTS:
        hf["peft_type"] = PROMPTS.get(name, "LORA")  # HF sets it when a config is made
    assert mine == hf


IN_HF = {name: method for name, method in METHODS.items() if hasattr(peft, method.config.__name__)}


@pytest.mark.parametrize("method", IN_HF.values(), ids=IN_HF)
def test_every_method_has_hfs_fields_and_defaults(method):
    """But for what only ours has, which files hold only if it is used."""
    name, beyond = method.config.__name__, method.config.beyond_hf
    hf = {field.name: default(field) for field in dataclasses.fields(getattr(peft, name))} | {"peft_type": method.name}
    mine = {field.name: default(field) for field in dataclasses.fields(method.config) if field.name not in beyond}
    assert mine == hf


def test_three_methods_are_ours_alone():
    assert METHODS.keys() - IN_HF.keys() == {"BITFIT", "BOTTLENECK_ADAPTER", "LOW_RANK_ADAPTER"}


PROMPT_FIELDS = {
    "PromptTuningConfig": {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 7, "token_dim": 32},
    "PromptEncoderConfig": {
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 3,
        "encoder_dropout": 0.1,
    },
    "PrefixTuningConfig": {
        "init_weights": "zero",
        "prefix_projection": True,
        "num_layers": 2,
        "encoder_hidden_size": 9,
    },
    "MultitaskPromptTuningConfig": {"prompt_tuning_init": "EXACT_SOURCE_TASK", "num_ranks": 3, "num_tasks": 4},
    "CartridgeConfig": {"num_virtual_tokens": 5, "num_frozen_tokens": 2},
    "CPTConfig": {"cpt_token_ids": [3, 1], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 4]},
}


@pytest.mark.parametrize("name", PROMPT_FIELDS)
def test_files_of_prompt_configs_go_both_ways(name, tmp_path):
    fields = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"], "revision": "x"} | PROMPT_FIELDS[name]
    hf = getattr(peft, name)(**fields)
    hf.save_pretrained(tmp_path / "theirs")
    mine = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(mine) is getattr(msft_peft, name)
    mine.save_pretrained(tmp_path / "ours")
    getattr(msft_peft, name)(**fields).save_pretrained(tmp_path / "fresh")
    again = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert plain(again.to_dict()) == plain(hf.to_dict()) == plain(mine.to_dict())
    files = [ours.config_in(tmp_path / who) for who in ("ours", "fresh", "theirs")]
    assert files[0] == files[1] == files[2]


def test_the_enums_of_prompt_configs():
    for name in ("PromptTuningInit", "PromptEncoderReparameterizationType", "MultitaskPromptTuningInit"):
        hf, mine = getattr(peft, name), getattr(msft_peft, name)
        assert {member.name: member.value for member in mine} == {member.name: member.value for member in hf}


def test_the_fields_of_a_fresh_config():
    hf, mine = (plain(dataclasses.asdict(kind())) for kind in (peft.LoraConfig, LoraConfig))
    assert mine == hf


def test_task_types():
    assert {task.name: task.value for task in msft_peft.TaskType} == {t.name: t.value for t in peft.TaskType}


def test_default_targets_of_the_architectures():
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as HF_TARGETS

    from msft_peft.tuners.lora import METHOD

    def in_order(table):
        return {key: sorted(value) if isinstance(value, list) else value for key, value in table.items()}

    assert in_order(METHOD.default_targets) == in_order(HF_TARGETS)


# --- files ---------------------------------------------------------------------------------------------------------


def random_config(seed: int) -> dict:
    """Arguments of a LoraConfig that HF accepts without a warning; fields that are not built here yet included."""
    r = random.Random(seed)

    def maybe(value, chance=0.4):
        return value() if r.random() < chance else None

    names = ["q_proj", "v_proj", "lm_head", "model.layers.0.mlp.up_proj", "émb"]
    is_list = r.random() < 0.7
    fields = {
        "r": r.randint(1, 64),
        "lora_alpha": r.choice([1, 8, 16, 0.5, 32]),
        "lora_dropout": r.choice([0.0, 0.05, 0.5]),
        "target_modules": r.sample(names, r.randint(1, 4))
        if is_list
        else r.choice([None, "all-linear", r".*\.q_proj"]),
        "exclude_modules": maybe(lambda: r.choice([["lm_head", "k"], r".*\.3\..*"])),
        "bias": r.choice(["none", "all", "lora_only"]),
        "use_rslora": r.random() < 0.3,
        "fan_in_fan_out": r.random() < 0.3,
        "modules_to_save": maybe(lambda: r.sample(["classifier", "score", "lm_head"], r.randint(1, 3))),
        "init_lora_weights": r.choice([True, False, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal"]),
        "rank_pattern": r.choice([{}, {"q_proj": 3, r"layers\.1\..*": 5}]),
        "alpha_pattern": r.choice([{}, {"q_proj": 32, "v_proj": 0.25}]),
        "task_type": maybe(lambda: r.choice(list(peft.TaskType)).value),
        "inference_mode": r.random() < 0.3,
        "revision": maybe(lambda: "main"),
        "base_model_name_or_path": maybe(lambda: "org/base"),
        "peft_version": maybe(lambda: "0.10.0"),
    }
    if is_list:
        fields["layers_to_transform"] = maybe(lambda: r.choice([1, [0, 2]]))
        if fields["layers_to_transform"] is not None:
            fields["layers_pattern"] = maybe(lambda: r.choice(["layers", ["h", "layers"]]))
    if fields["use_rslora"]:
        fields["rank_pattern"] = fields["alpha_pattern"] = {}
    unbuilt = {
        "use_dora": True,
        "lora_bias": True,
        "trainable_token_indices": r.choice([[0, 3], {"embed_tokens": [1]}]),
        "target_parameters": ["experts.w"],
        "layer_replication": [[0, 2], [1, 2]],
        "use_qalora": True,
        "qalora_group_size": 32,
        "ensure_weight_tying": True,
        "megatron_core": "other.core",
        "kasa_config": peft.KasaConfig() if hasattr(peft, "KasaConfig") else None,
        "arrow_config": peft.ArrowConfig(top_k=2),
        "velora_config": {"num_groups": 32},
    }
    chosen = r.choice(list(unbuilt))
    if chosen == "lora_bias":
        fields["init_lora_weights"] = True
    if r.random() < 0.6:
        fields[chosen] = unbuilt[chosen]
    return fields


@pytest.mark.parametrize("seed", range(40))
def test_config_files_go_both_ways(seed, tmp_path):
    """HF's file loads here, ours loads there, and nothing is lost or added either time; no warnings."""
    fields = random_config(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            hf = peft.LoraConfig(**fields)
        except UserWarning:
            pytest.fail(f"HF warns of {fields}: choose others")
        hf.save_pretrained(tmp_path / "theirs")
        mine = PeftConfig.from_pretrained(tmp_path / "theirs")
        assert type(mine) is LoraConfig
        mine.save_pretrained(tmp_path / "ours")
        again = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert ours.config_in(tmp_path / "ours") == ours.config_in(tmp_path / "theirs")
    assert plain(again.to_dict()) == plain(hf.to_dict())


@pytest.mark.parametrize("seed", range(20))
def test_the_same_arguments_make_the_same_file(seed, tmp_path):
    fields = random_config(1000 + seed)
    peft.LoraConfig(**fields).save_pretrained(tmp_path / "theirs")
    fields = {key: plain(value) for key, value in fields.items()}
    LoraConfig(**fields).save_pretrained(tmp_path / "ours")
    mine, hf = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for name in SETS:
        mine[name], hf[name] = plain(mine[name]), plain(hf[name])
        if isinstance(hf[name], list):
            mine[name], hf[name] = sorted(mine[name]), sorted(hf[name])
    assert mine == hf


def test_a_file_of_a_newer_version(tmp_path):
    """Unknown fields are dropped with one warning in both libraries, and its text begins alike."""
    LoraConfig(target_modules=["a"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zeta": 1, "brand_new_field": [2]}))
    for library in (peft, msft_peft):
        with pytest.warns(UserWarning, match="Unexpected keyword arguments") as caught:
            config = library.PeftConfig.from_pretrained(tmp_path)
        assert len(caught) == 1
        expected = "Unexpected keyword arguments ['brand_new_field', 'zeta'] for class LoraConfig, these are ignored. "
        assert str(caught[0].message).startswith(expected)
        assert config.r == 8


def test_the_smallest_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["a"]}')
    hf, mine = (library.PeftConfig.from_pretrained(tmp_path) for library in (peft, msft_peft))
    assert plain(mine.to_dict()) == plain(hf.to_dict())


@pytest.mark.parametrize("init", ["Gaussian", "GAUSSIAN"])
def test_the_case_of_gaussian_does_not_matter(init):
    get_peft_model(ours.cells.Mlp(), LoraConfig(target_modules=["lin0"], init_lora_weights=init))


# --- which layers are meant ----------------------------------------------------------------------------------------

TREE = {
    "model.embed_tokens": "table",
    "q_proj": "linear",
    "layers.0.q_proj": "linear",
    "layers.1.q_proj": "linear",
    "encoder.h.0.attn.c_attn": "linear",
    "encoder.h.1.attn.c_attn": "linear",
    "encoder.h.1.layers.0.q_proj": "linear",
    "vision.convs.0": "conv",
    "vision.convs.1": "conv",
    "lm_head": "linear",
    "classifier.dense": "linear",
    "classifier.out_proj": "linear",
}
for _i in range(3):
    TREE |= {f"model.layers.{_i}.self_attn.{name}_proj": "linear" for name in "qko"}
    TREE |= {f"model.layers.{_i}.mlp.experts.{e}.up_proj": "linear" for e in range(2)}
    TREE |= {f"model.layers.{_i}.xq_proj": "linear", f"model.layers.{_i}.norm": "norm"}

TORCH_LEAVES = {
    "linear": lambda: torch.nn.Linear(6, 6),
    "table": lambda: torch.nn.Embedding(5, 6),
    "conv": lambda: torch.nn.Conv2d(2, 4, 3),
    "norm": lambda: torch.nn.LayerNorm(6),
}
CELL_LEAVES = {
    "linear": lambda: ms.nn.Dense(6, 6),
    "table": lambda: ms.nn.Embedding(5, 6),
    "conv": lambda: ms.nn.Conv2d(2, 4, 3, has_bias=True),
    "norm": lambda: ms.nn.LayerNorm((6,)),
}


def grow(root, leaves, container, add):
    """The tree of TREE below `root`."""
    nodes = {"": root}
    for path, kind in TREE.items():
        parts = path.split(".")
        for depth, name in enumerate(parts, 1):
            here = ".".join(parts[:depth])
            if here not in nodes:
                nodes[here] = leaves[kind]() if depth == len(parts) else container()
                add(nodes[".".join(parts[: depth - 1])], name, nodes[here])
    return root


def torch_tree():
    return grow(torch.nn.Module(), TORCH_LEAVES, torch.nn.Module, lambda node, name, new: node.add_module(name, new))


def cell_tree():
    return grow(ms.nn.Cell(), CELL_LEAVES, ms.nn.Cell, lambda node, name, new: node.insert_child_to_cell(name, new))


def random_targets(seed: int) -> dict:
    """Arguments that choose layers of TREE, among them some that match nothing, or what cannot be adapted."""
    r = random.Random(seed)
    names = ["q_proj", "k_proj", "self_attn.q_proj", "up_proj", "0.up_proj", "xq_proj", "c_attn", "embed_tokens"]
    names += [
        "layers.1.q_proj",
        "model.layers.2.self_attn.o_proj",
        "convs.1",
        "lm_head",
        "dense",
        "classifier.out_proj",
    ]
    rare = ["proj", "q", "norm", "self_attn", "layers", "1", "odel.embed_tokens", "Q_PROJ", "q.proj"]
    regexes = [
        r".*\.q_proj",
        r"q_proj",
        r".*q_proj",
        r".*(attn|experts\.1)\.[a-z_]*proj",
        r"model\.layers\.[02]\..*_proj",
    ]
    regexes += [r".*embed.*", r"(?!.*head).*(c_attn|head|dense)", r".*\.norm", "self_attn", "all-linear", "ALL-LINEAR"]

    def some(most):
        chosen = r.sample(names, r.randint(1, most))
        return chosen + ([r.choice(rare)] if r.random() < 0.15 else [])

    fields = {"r": r.randint(1, 5), "lora_alpha": r.choice([1, 7, 16]), "use_rslora": r.random() < 0.3}
    fields["target_modules"] = some(5) if r.random() < 0.65 else r.choice(regexes)
    if r.random() < 0.4:
        fields["exclude_modules"] = r.choice([some(3), some(2), r".*\.0\..*", r"model\..*", r"nothing", ["nothing"]])
    if r.random() < 0.3:
        fields["modules_to_save"] = r.sample(["classifier", "lm_head", "embed_tokens", "classifier.dense"], 1)
    if r.random() < 0.45:
        fields["layers_to_transform"] = r.choice([0, 1, [0, 2], [1], [], [7]])
        if r.random() < 0.5:
            fields["layers_pattern"] = r.choice(
                ["layers", "h", ["layers", "h"], ["h", "layers"], "experts", "lay.*", []]
            )
    patterns = [*names, r"layers\.\d", r"model\.layers\.1\..*", r".*\.k_proj", "q_proj|k_proj", "experts.0.up_proj"]
    if r.random() < 0.5:
        fields["rank_pattern"] = {key: r.randint(1, 9) for key in r.sample(patterns, r.randint(1, 4))}
    if r.random() < 0.5:
        fields["alpha_pattern"] = {key: r.choice([2, 5, 0.5]) for key in r.sample(patterns, r.randint(1, 4))}
    return fields


def outcome(library, tree, layer_class):
    """fields -> ({adapted path: (r, scaling)}, paths trained whole) or the built-in kind of the error."""

    def run(fields):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = library.get_peft_model(tree(), library.LoraConfig(**fields))
            except Exception as error:  # whatever it is, it is compared
                return next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins"), str(error)
        return adapted(model, layer_class), model

    return run


def adapted(model, layer_class) -> dict[str, tuple[int, float]]:
    tree = model.base_model.model
    walk = tree.named_modules() if isinstance(tree, torch.nn.Module) else tree.cells_and_names()
    return {path: (m.r["default"], round(m.scaling["default"], 12)) for path, m in walk if isinstance(m, layer_class)}


@pytest.mark.parametrize("seed", range(150))
def test_the_same_layers_are_meant(seed):
    """Names, rank and scaling of every adapted layer, and the kind of the error where there is one."""
    fields = random_targets(seed)
    hf, hf_more = outcome(peft, torch_tree, LoraLayer)(fields)
    mine, more = outcome(msft_peft, cell_tree, TunerLayer)(fields)
    if not isinstance(hf, dict) or not isinstance(mine, dict):
        assert mine is hf, f"{fields}: ours {mine if isinstance(mine, dict) else more}, HF {hf_more}"
    else:
        assert mine == hf, f"{fields}: {set(mine.items()) ^ set(hf.items())} on one side only"
        trained = {ours.torch_key(p.name) for p in more.trainable_params()}
        assert trained == {name for name, p in hf_more.named_parameters() if p.requires_grad}, fields


def test_the_random_targets_are_of_all_kinds():
    """The test above sees enough of successes and of failures, so that it can fail."""
    kinds = [outcome(peft, torch_tree, LoraLayer)(random_targets(seed))[0] for seed in range(40)]
    successes = [kind for kind in kinds if isinstance(kind, dict)]
    assert 20 <= len(successes) < len(kinds)
    assert len({tuple(sorted(kind)) for kind in successes}) > 15


WARNINGS = {
    "exclude_modules": {"target_modules": ["q_proj"], "exclude_modules": ["nothing"]},
    "rank_pattern": {"target_modules": ["k_proj"], "rank_pattern": {"zz": 2, "k_proj": 3, "aa": 4}},
    "alpha_pattern": {"target_modules": ["k_proj"], "alpha_pattern": {"zz": 2}},
    "fan_in_fan_out": {"target_modules": ["k_proj"], "fan_in_fan_out": True},
    "loftq": {"target_modules": ["k_proj"], "loftq_config": {"loftq_bits": 4}},
    "alora": {"target_modules": ["k_proj"], "alora_invocation_tokens": [1]},
}


@pytest.mark.parametrize("name", list(WARNINGS))
def test_warnings_have_their_kind_and_text(name):
    """Sets are printed as lists here, and quotation marks are let be."""
    found = []
    for library, tree in ((peft, torch_tree), (msft_peft, cell_tree)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = library.LoraConfig(**WARNINGS[name])
            if name != "alora":  # not built here yet; HF warns when the config is made
                library.get_peft_model(tree(), config)
        kinds = [(w.category, str(w.message)) for w in caught if not issubclass(w.category, DeprecationWarning)]
        found.append([(kind, text.translate(str.maketrans("", "", "`'{}[]"))) for kind, text in kinds])
    hf, mine = found
    assert len(mine) == len(hf) == 1
    assert issubclass(mine[0][0], hf[0][0])
    assert mine[0][1].split(".")[0] == hf[0][1].split(".")[0]


def test_the_tables_of_classes_are_hfs():
    """What is here has HF's names; all that is not is known by name."""
    from msft_peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from msft_peft.config import NOT_BUILT

    for table, name in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, "PEFT_TYPE_TO_CONFIG_MAPPING"),
        (PEFT_TYPE_TO_TUNER_MAPPING, "PEFT_TYPE_TO_TUNER_MAPPING"),
    ):
        theirs = {key.value: kind.__name__ for key, kind in getattr(peft, name).items()}
        ours = {key.value: kind.__name__ for key, kind in table.items()}
        assert {key: name for key, name in ours.items() if key in theirs} == {
            key: name for key, name in theirs.items() if key not in NOT_BUILT
        }
        assert all(theirs[key].startswith(start) for key, start in NOT_BUILT.items())
    ours = {task: kind.__name__ for task, kind in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}
    assert ours == {str(task): kind.__name__ for task, kind in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}

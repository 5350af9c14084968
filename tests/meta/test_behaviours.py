"""What HF peft's users rely on, by number, and the tests that hold us to it: each of them must be there.

The numbers are those of the reference on HF peft 0.21.2 that this project was written from: behaviours, and surprises
(S) that are not to be copied. What belongs to methods that are not here yet is left out.
"""

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

BEHAVIOURS: dict[str, str] = {
    # Construction and matching.
    "1 a fresh adapter leaves the output": "test_a_fresh_adapter_is_the_identity_exactly_if_the_method_says_so",
    "2 what is trainable": "test_exactly_the_adapter_trains",
    "3 lists, regexes, all-linear": (
        "test_names_ends_of_paths_and_regexes test_all_linear_leaves_the_output_head_alone "
        "test_all_linear_leaves_a_classifiers_head_alone test_the_same_layers_are_meant"
    ),
    "4 exclusion, layer indices": (
        "test_exclusion_wins test_a_layer_trained_whole_carries_no_adapter test_the_first_number_in_a_path_counts "
        "test_bad_values_are_refused_at_once"
    ),
    "5 default targets": "test_default_targets test_default_targets_of_the_architectures",
    "6 nothing matched": (
        "test_near_names_are_suggested test_excluding_nothing_warns test_patterns_that_match_nothing_are_named"
    ),
    "7 rank and alpha patterns": "test_patterns test_the_first_pattern_wins",
    "8 a failed add_adapter leaves nothing": "test_a_bad_second_config_leaves_the_first_adapter_alone",
    "9 many names mean the same layers": "test_the_same_layers_are_meant",
    "10 a second wrap warns": "test_a_second_wrap_warns",
    "11 injecting without a wrapper, and by keys": (
        "test_injecting_without_a_peft_model test_the_keys_decide_where_adapters_go test_keys_choose_the_same_layers"
    ),
    # LoRA's numbers.
    "12 the formula": (
        "test_the_formula_of_a_dense_layer test_the_formula_of_an_embedding test_the_formula_of_a_convolution"
    ),
    "13 initial values": (
        "test_init_true_is_he_uniform_and_zero test_init_gaussian "
        "test_init_false_draws_both test_init_of_an_embedding "
        "test_fresh_weights_are_drawn_from_hf_s_distributions"
    ),
    "14 float32 adapters of half-precision bases": (
        "test_adapters_of_a_half_precision_model_are_float32 test_half_precision_bases_get_float32_adapters"
    ),
    "15 fan_in_fan_out is corrected": "test_fan_in_fan_out_follows_the_layer_with_a_warning",
    "16 convolutions and their groups": (
        "test_the_formula_of_a_grouped_convolution test_the_rank_of_a_grouped_convolution_must_fit"
    ),
    "17 DoRA": "test_doras_norm_is_that_of_the_sum test_hf_writes_and_we_read test_numbers",
    "18 inits that change the base, and their conversion": (
        "test_the_output_stays_and_unload_gives_the_base_back test_conversion_to_a_plain_lora_of_the_untouched_base "
        "test_hf_opens_the_converted_adapter_on_the_untouched_base"
    ),
    "19 lora_bias": "test_bias_of_b_merges_only_into_a_bias",
    "20 unsupported combinations": "test_what_is_refused_leaves_the_model_alone",
    # Merging.
    "21 merge and unmerge": "test_merged_and_unmerged_outputs_agree",
    "22 merge_and_unload": (
        "test_merge_and_unload_leaves_the_base_models_own_cells test_merge_and_unload_of_one_adapter_of_two"
    ),
    "23 safe_merge": "test_a_safe_merge_writes_no_nan",
    "24 unload": "test_unload_gives_back_the_base_model",
    "25 what is refused or undone while merged": (
        "test_switching_a_merged_model_unmerges_it_first test_a_merged_adapter_cannot_be_deleted "
        "test_it_is_for_inference_with_unmerged_adapters test_a_disabled_model_acts_as_its_base_whatever_is_merged"
    ),
    "26 tied embeddings": "test_tied_weights_are_not_merged test_only_the_named_rows_change_and_a_tied_head_follows",
    # Several adapters.
    "27 an added adapter is idle": "test_an_added_adapter_is_inactive_and_frozen",
    "28 one, or several at once": "test_each_adapter_alone_and_both_together test_two_adapters",
    "29 taken names, other methods": "test_a_taken_name_is_refused test_methods_do_not_mix_in_one_model",
    "30 deleting": "test_deleting_the_active_adapter_makes_another_one_active",
    "31 adapters on different layers": "test_adapters_may_be_on_different_layers",
    "32 one adapter with biases": "test_only_one_adapter_may_train_biases",
    "33 copies of whole layers": (
        "test_a_layer_trained_whole_shows_the_copy_in_use test_each_adapter_alone_and_both_together"
    ),
    "34 mixed batches": (
        "test_each_row_goes_through_its_own_adapter test_names_that_do_not_fit test_a_batch_divided_among_adapters"
    ),
    "35 disabling": "test_disabled_is_the_base test_layers_stay_disabled_until_enabled",
    "36 weighted adapters": (
        "test_the_same_combination test_the_same_refusals test_the_exact_sum_on_every_kind_of_layer"
    ),
    "37 status": "test_status test_irregular_states_are_told",
    "38 mixed models": "test_38_adapters_of_two_methods_act_together test_38_what_is_not_to_be_had",
    # Files and state.
    "39 what is written": "test_the_folder_holds_what_hf_writes_and_the_checkpoint test_two_adapters_in_one_folder",
    "40 keys": "test_the_keys_are_hfs test_the_same_config_and_keys",
    "41 under another name": "test_under_another_adapter_name",
    "42 both directions": "test_hf_writes_and_we_read test_we_write_and_hf_reads_without_a_warning",
    "43 the config on disk": "test_the_config_is_written_for_inference_and_read_back test_config_files_go_both_ways",
    "44 unknown and absent fields": "test_unknown_fields_are_dropped_with_one_warning test_the_smallest_file",
    "45 tensors that do not fit": "test_all_faults_are_listed_at_once test_mismatched_sizes_may_be_ignored",
    "46 no config file": "test_a_failed_load_changes_nothing test_files",
    "47 frozen or trainable after loading": (
        "test_a_trainable_adapter_trains_what_it_trained test_the_config_is_written_for_inference_and_read_back"
    ),
    "48 safetensors first": "test_the_checkpoint_alone_is_enough",
    "49 embeddings in files": (
        "test_49_embeddings_are_saved_where_they_are_asked_for test_files_that_carry_the_embeddings"
    ),
    "50 tied tensors": "test_50_tied_weights_are_saved_under_each_of_their_names",
    "51 selected adapters, main process, state dicts": (
        "test_only_the_main_process_writes test_51_values_from_another_state_dict_are_saved"
    ),
    "52 low_cpu_mem_usage": "test_52_no_weights_are_drawn_and_none_can_pass_unnoticed test_52_files_load_alike",
    "53 key_mapping": "test_53_key_mapping_renames_what_a_file_holds test_key_mappings_rename_alike",
    "54 base weights under their own names": "test_54_base_weights_have_the_names_that_they_had",
    # Prompts, tasks and tools.
    "55 what stands before the input": (
        "test_it_stands_before_the_input test_numbers_and_files test_sizes_of_a_prefix_where_heads_are_shared"
    ),
    "56 the virtual tokens alone are saved": "test_the_state_dict_is_what_hfs_file_holds test_numbers_and_files",
    "57 heads of tasks": (
        "test_the_task_decides_the_class test_hf_s_adapter_on_our_model "
        "test_exactly_the_prompt_and_the_heads_train test_numbers_and_files"
    ),
    "58 generation": "test_greedy_generation_in_both_modes test_the_same_greedy_tokens test_generation_in_graph_mode",
    "59 no prefix with gradient checkpointing": "test_prefixes_and_gradient_checkpointing",
    "60 trainable tokens": (
        "test_only_the_named_rows_change_and_a_tied_head_follows test_rows_of_a_tied_head_of_its_own"
    ),
    "63 hot swapping": (
        "test_63_swapping_under_compiled_code_compiles_nothing test_63_layers_that_the_new_adapter_lacks_add_nothing "
        "test_63_tensors_that_do_not_fit_change_nothing test_hf_swaps_the_same"
    ),
    "64 rescaling, LoRA+, LoRA-FA, conversion": (
        "test_64_rescaling_is_seen_by_compiled_code_and_undone test_loraplus "
        "test_lorafa test_a_fixed_rank_is_the_nearest"
    ),
    # Surprises that are done right here; docs/differences.md has a line for each.
    "S1 adapters named like parts of paths": "test_a_name_that_occurs_elsewhere_is_harmless",
    "S4 adapter_names of every method": "test_each_row_goes_through_its_own_adapter",
    "S5 an error inside a mixed batch": "test_an_error_inside_leaves_no_trace",
    "S6 replicated layers do not merge": "test_replicated_blocks_share_their_weights_and_go_away_again",
    "S8 disabling a frozen adapter": "test_disabled_is_the_base",
    "S9 deleting the last adapter": "test_deleting_the_active_adapter_makes_another_one_active",
    "S10 modules_to_save by whole names": "test_modules_to_save_named_like_the_end_of_others",
    "S11 missing keys of this adapter alone": "test_adapters_named_like_parts_of_paths",
    "S12 disabling prompts before any head": "test_switches_are_seen_in_both_modes",
    "S16 training goes on from files": "test_training_goes_on_where_it_was_left",
    "S13 no false alarm about lora_bias": "test_nothing_warns_without_need",
    "S14 merging tied and half-precision weights": (
        "test_tied_weights_are_not_merged test_bfloat16_weights_merge_and_come_back_to_the_bit"
    ),
    "S17 the exact weighted sum": "test_cat_is_the_exact_sum test_linear_combines_the_factors",
    "S18 stable bytes; taken names of combinations": (
        "test_saving_again_gives_the_same_bytes test_a_refusal_leaves_no_trace"
    ),
}


@functools.cache
def names_of_tests() -> set[str]:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("test_*.py"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_behaviour_has_its_tests(behaviour: str):
    missing = set(BEHAVIOURS[behaviour].split()) - names_of_tests()
    assert not missing, f"{behaviour}: no test is called {sorted(missing)}"

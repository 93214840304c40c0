"""Know the methods of DeepSpeed that repairs depend on: digests of their texts, which versions have them.

Written by `python -m tests.deepspeed.versions --renew VERSION`.
"""

from typing import Final

KNOWN_SOURCES: Final[dict[str, dict[str, str]]] = {
    "DeepSpeedEngine._backward_epilogue": {
        "7528263664e00276": "0.18.3 to 0.18.9",
        "2492ef7ef0781227": "0.19.0 to 0.19.2",
        "d5ad9b734fc2e13d": "0.19.3 to 0.19.5",
        "ae21a80c34a07b07": "0.19.6 to 0.19.7",
        "5d52976af041dc08": "0.19.8",
    },
    "DeepSpeedEngine._backward_prologue": {
        "81caa20292b10982": "0.18.3 to 0.18.4",
        "763db24e80112961": "0.18.5 to 0.19.0",
        "f82bbdb39d44a620": "0.19.1 to 0.19.4",
        "c2426f652d8bdb22": "0.19.5",
        "1833c85100fb0232": "0.19.6 to 0.19.7",
        "373ee3732451fc08": "0.19.8",
    },
    "DeepSpeedEngine.backward": {
        "34ab98d9f6482e87": "0.18.3",
        "9f4d343a962a464e": "0.18.4 to 0.19.3",
        "7e382c1dcb9a4d88": "0.19.4 to 0.19.5",
        "2ea70e72366ba775": "0.19.6 to 0.19.7",
        "b8c4368bee04391d": "0.19.8",
    },
    "DeepSpeedZeroOptimizer._finalize_cpu_offload_gradient_accumulation": {
        "absent": "0.18.0 to 0.19.4",
        "5e22c17a8c152150": "0.19.5 to 0.19.7",
        "6228bc321fee7607": "0.19.8",
    },
    "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state": {
        "45e666d78112a891": "0.18.0 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer._link_all_hp_params": {
        "0d12492fd7b5a581": "0.18.0 to 0.19.6",
        "e91c2f7e8f29ef11": "0.19.7 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer._update_scale": {
        "456ef78f7cbaa909": "0.18.0 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer._wait_for_offload_copies": {
        "absent": "0.18.0 to 0.19.7",
        "e509dd0ad7458a37": "0.19.8",
    },
    "DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu": {
        "c2f1ebd2ad5833cc": "0.18.0 to 0.18.2",
        "ef90568e7e6ef167": "0.18.3 to 0.18.9",
        "f781f24d1ac385d3": "0.19.0 to 0.19.7",
        "8d3c25962356b40e": "0.19.8",
    },
    "DeepSpeedZeroOptimizer.copy_grads_in_partition": {
        "715b2a294037cc7c": "0.18.0 to 0.18.9",
        "de5028d374906a1c": "0.19.0 to 0.19.4",
        "fab8f850eabad415": "0.19.5 to 0.19.7",
        "110f723937b99fb9": "0.19.8",
    },
    "DeepSpeedZeroOptimizer.get_all_grad_tensors": {
        "412137c5d2d69857": "0.18.1 to 0.18.2",
    },
    "DeepSpeedZeroOptimizer.get_flat_partition": {
        "36a6470a9dd6b1ed": "0.18.1 to 0.18.2",
    },
    "DeepSpeedZeroOptimizer.get_gradient_for_reduction": {
        "6f5ba2291774dcbf": "0.18.0 to 0.19.7",
        "74006491879fefa1": "0.19.8",
    },
    "DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue": {
        "8aab6ad622662a54": "0.18.1 to 0.18.2",
    },
    "DeepSpeedZeroOptimizer.reduce_gradients": {
        "385b8e94b1d3cee7": "0.18.0 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer.reduce_ready_partitions_and_remove_grads": {
        "9391849aed741674": "0.18.0 to 0.19.4",
        "46ef5f92c1b87d6f": "0.19.5 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer.step": {
        "80b29d8459a480b5": "0.18.0 to 0.19.1",
        "bd5f9c0f526c0885": "0.19.2 to 0.19.4",
        "db8ff3856f37a5bb": "0.19.5 to 0.19.6",
        "8c19dc19455ed8d4": "0.19.7",
        "9520884fd916d178": "0.19.8",
    },
    "DeepSpeedZeroOptimizer.update_offload_overflow_tracker": {
        "0cb67c0a3f669a35": "0.18.0 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition": {
        "17cbde2bfa7a615b": "0.18.0 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer_Stage3._update_scale": {
        "456ef78f7cbaa909": "0.18.0 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer_Stage3.partition_grads": {
        "402ea8afde1da26f": "0.18.0 to 0.18.2",
        "35fe4f69c5b3fa1d": "0.18.3 to 0.19.2",
        "db7d6431ba655d50": "0.19.3 to 0.19.4",
        "93119b25314ec6d3": "0.19.5 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer_Stage3.set_fp32_grad_for_param": {
        "2fdbdc6966fc2e9f": "0.18.0 to 0.19.2",
        "83ea3ce32ea5a9e5": "0.19.3 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer_Stage3.set_full_hp_param": {
        "5cb472282059e426": "0.18.0 to 0.19.2",
        "fef85c5a0ff5d622": "0.19.3 to 0.19.8",
    },
    "DeepSpeedZeroOptimizer_Stage3.step": {
        "5b7adf32e49697e1": "0.18.0 to 0.19.7",
        "c751b3209f83d3b9": "0.19.8",
    },
    "FP16_UnfusedOptimizer._update_scale": {
        "b4e52f2311d3f225": "0.18.0 to 0.18.5",
        "8a8f6f3f011bc69e": "0.18.6 to 0.19.8",
    },
    "FP16_UnfusedOptimizer.initialize_optimizer_states": {
        "59c37209d79fa8b2": "0.18.0 to 0.19.8",
    },
    "FP16_UnfusedOptimizer.step": {
        "0b9b60a6b0164aad": "0.18.0 to 0.18.5",
        "391f9b64766de806": "0.18.6 to 0.19.7",
        "626bd9aa8af843e9": "0.19.8",
    },
    "FP16_UnfusedOptimizer.unscale_and_clip_grads": {
        "d17beff3f88884b6": "0.18.0 to 0.18.5",
        "748792c7d1075f9d": "0.18.6 to 0.19.8",
    },
    "Init._allgather_params_coalesced": {
        "0d1b1407adeff20d": "0.18.0 to 0.19.2",
        "0c297d676686858b": "0.19.3 to 0.19.5",
        "2f1079d323697668": "0.19.6 to 0.19.7",
    },
    "OptimizerSwapper._adjust_for_misaligned_lengths": {
        "1e87ad5071059ae9": "0.18.0 to 0.19.8",
    },
}

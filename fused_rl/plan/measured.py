"""What was measured on GPUs, in ms: from bench/results by bench/predictions.py."""

# The commit that ran.
COMMITS = {"h100": "145b923", "h200": "d709148"}

# (card, tokens, H, V, frozen) -> way -> median, bfloat16, all tokens under a GRPO loss.
MEASURED: dict[tuple[str, int, int, int, bool], dict[str, float]] = {
    ("h100", 8192, 2304, 256000, False): {
        "eager torch": 92.3,
        "eager torch, no gradient": 47.6,
        "linear_logprobs": 67.7,
        "linear_logprobs, no gradient": 24.4,
        "linear_policy_loss": 73.1,
    },
    ("h100", 8192, 2304, 256000, True): {
        "eager torch": 79.1,
        "eager torch, no gradient": 47.6,
        "linear_logprobs": 45.5,
        "linear_logprobs, no gradient": 24.4,
        "linear_policy_loss": 49.5,
    },
    ("h100", 8192, 4096, 151936, False): {
        "eager torch": 72.5,
        "eager torch, no gradient": 34.3,
        "linear_logprobs": 66.0,
        "linear_logprobs, no gradient": 21.6,
        "linear_policy_loss": 65.7,
    },
    ("h100", 8192, 4096, 151936, True): {
        "eager torch": 58.2,
        "eager torch, no gradient": 34.3,
        "linear_logprobs": 41.2,
        "linear_logprobs, no gradient": 21.6,
        "linear_policy_loss": 43.2,
    },
    ("h100", 16384, 2048, 128256, False): {
        "eager torch": 86.6,
        "eager torch, no gradient": 46.2,
        "linear_logprobs": 62.6,
        "linear_logprobs, no gradient": 22.5,
        "linear_policy_loss": 60.9,
    },
    ("h100", 16384, 2048, 128256, True): {
        "eager torch": 74.9,
        "eager torch, no gradient": 46.2,
        "linear_logprobs": 42.1,
        "linear_logprobs, no gradient": 22.5,
        "linear_policy_loss": 46.6,
    },
    ("h200", 8192, 2304, 256000, False): {
        "eager torch": 78.6,
        "eager torch, no gradient": 39.1,
        "linear_logprobs": 68.9,
        "linear_logprobs, no gradient": 24.7,
        "linear_policy_loss": 71.4,
    },
    ("h200", 8192, 2304, 256000, True): {
        "eager torch": 65.2,
        "eager torch, no gradient": 39.1,
        "linear_logprobs": 45.9,
        "linear_logprobs, no gradient": 24.7,
        "linear_policy_loss": 51.9,
    },
    ("h200", 8192, 4096, 151936, False): {
        "eager torch": 66.0,
        "eager torch, no gradient": 30.1,
        "linear_logprobs": 67.7,
        "linear_logprobs, no gradient": 21.7,
        "linear_policy_loss": 67.0,
    },
    ("h200", 8192, 4096, 151936, True): {
        "eager torch": 50.7,
        "eager torch, no gradient": 30.1,
        "linear_logprobs": 41.9,
        "linear_logprobs, no gradient": 21.7,
        "linear_policy_loss": 42.4,
    },
    ("h200", 16384, 2048, 128256, False): {
        "eager torch": 72.9,
        "eager torch, no gradient": 37.4,
        "linear_logprobs": 62.1,
        "linear_logprobs, no gradient": 22.9,
        "linear_policy_loss": 61.3,
    },
    ("h200", 16384, 2048, 128256, True): {
        "eager torch": 62.4,
        "eager torch, no gradient": 37.4,
        "linear_logprobs": 43.5,
        "linear_logprobs, no gradient": 22.9,
        "linear_policy_loss": 59.5,
    },
}

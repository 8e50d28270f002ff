"""What was measured on GPUs, in ms: from bench/results by bench/predictions.py."""

# The commit that ran.
COMMITS = {"h100": "50f1677", "h200": "d709148"}

# (card, tokens, H, V, frozen) -> way -> median, bfloat16, all tokens under a GRPO loss.
MEASURED: dict[tuple[str, int, int, int, bool], dict[str, float]] = {
    ("h100", 8192, 896, 151936, False): {
        "linear_logprobs": 20.4,
        "linear_logprobs, no gradient": 4.5,
        "linear_policy_loss": 17.6,
    },
    ("h100", 8192, 896, 151936, True): {
        "linear_logprobs": 11.3,
        "linear_logprobs, no gradient": 4.5,
        "linear_policy_loss": 13.1,
    },
    ("h100", 8192, 1024, 151936, False): {
        "linear_logprobs": 22.5,
        "linear_logprobs, no gradient": 4.7,
        "linear_policy_loss": 19.3,
    },
    ("h100", 8192, 1024, 151936, True): {
        "linear_logprobs": 12.4,
        "linear_logprobs, no gradient": 4.7,
        "linear_policy_loss": 15.6,
    },
    ("h100", 8192, 2304, 256000, False): {
        "eager torch": 92.8,
        "eager torch, no gradient": 48.5,
        "linear_logprobs": 58.7,
        "linear_logprobs, no gradient": 14.5,
        "linear_policy_loss": 61.0,
    },
    ("h100", 8192, 2304, 256000, True): {
        "eager torch, no gradient": 48.5,
        "linear_logprobs": 29.5,
        "linear_logprobs, no gradient": 14.5,
        "linear_policy_loss": 39.5,
    },
    ("h100", 8192, 4096, 128256, False): {
        "linear_logprobs": 53.7,
        "linear_logprobs, no gradient": 13.8,
        "linear_policy_loss": 45.9,
    },
    ("h100", 8192, 4096, 128256, True): {
        "linear_logprobs": 26.5,
        "linear_logprobs, no gradient": 13.8,
        "linear_policy_loss": 29.4,
    },
    ("h100", 8192, 4096, 151936, False): {
        "eager torch": 72.5,
        "eager torch, no gradient": 35.2,
        "linear_logprobs": 61.6,
        "linear_logprobs, no gradient": 15.6,
        "linear_policy_loss": 53.2,
    },
    ("h100", 8192, 4096, 151936, True): {
        "eager torch": 59.2,
        "eager torch, no gradient": 35.2,
        "linear_logprobs": 32.6,
        "linear_logprobs, no gradient": 15.6,
        "linear_policy_loss": 33.1,
    },
    ("h100", 8192, 7168, 129280, False): {
        "linear_logprobs": 91.6,
        "linear_logprobs, no gradient": 22.5,
        "linear_policy_loss": 79.7,
    },
    ("h100", 8192, 7168, 129280, True): {
        "linear_logprobs": 48.6,
        "linear_logprobs, no gradient": 22.5,
        "linear_policy_loss": 48.3,
    },
    ("h100", 16384, 2048, 128256, False): {
        "linear_logprobs": 56.2,
        "linear_logprobs, no gradient": 13.1,
        "linear_policy_loss": 47.3,
    },
    ("h100", 16384, 2048, 128256, True): {
        "linear_logprobs": 26.4,
        "linear_logprobs, no gradient": 13.1,
        "linear_policy_loss": 33.3,
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

"""Two small worlds in which the whole loop can be watched on a CPU.

demo       A tiny model and a ranker are made from nothing; the model learns to use more colour words.
           bash run_sppo_demo.sh
smollm2    A real chat model of 135 million weights learns to follow instructions that a program can check.
           bash run_sppo_smollm2.sh
"""

from __future__ import annotations

import logging


def silence_libraries() -> None:
    """Hide two messages that say nothing to a reader on a CPU; errors and other warnings stay.

    DeepSpeed warns that it found no GPU, and transformers shows a bar while it saves a small model.
    """
    from transformers.utils import logging as transformers_logging

    logging.getLogger("DeepSpeed").addFilter(_is_about_more_than_the_cpu)
    transformers_logging.disable_progress_bar()


def _is_about_more_than_the_cpu(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()

"""What users type after detectron2's commands, `KEY VALUE …`, in this project's keys; or a refusal by name.

Every key of detectron2 stands in one table: `translated` (it becomes keys of this project), `agreeing` (taken where it
says what the config does), `untranslated` (one value is what is done anyway, or none).
"""

from ltss_benchmark.detectron2_keys.read import changed_config, read_config

__all__ = ["changed_config", "read_config"]

"""Files for other runtimes, each checked against the model it was made from."""

from diagconv_tf.exporting.exporter import export
from diagconv_tf.exporting.report import ExportError, ExportReport

__all__ = ["ExportError", "ExportReport", "export"]

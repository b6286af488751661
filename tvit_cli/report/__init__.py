"""Reports: charts, pictures, and self-contained pages of a training, evaluation or comparison."""

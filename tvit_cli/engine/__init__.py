"""The engines: one public function per verb, and the modules of training and evaluation."""

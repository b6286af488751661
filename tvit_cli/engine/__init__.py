"""What each verb does: one public function per verb, and the parts train and eval are made of."""

"""What can be measured: one public function and its result a file."""

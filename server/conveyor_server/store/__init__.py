"""Where carries go when they leave the device: the record's format and the places that keep it."""

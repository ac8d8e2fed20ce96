"""Linear kernels per precision, attention, norms and rotary embedding; each says what it can implement."""

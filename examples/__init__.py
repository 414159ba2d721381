"""Small projects that run as they are; `harperpy init --template NAME` copies one."""

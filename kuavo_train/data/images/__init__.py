"""Where pictures come from: decoded video, frames kept on disk, features of a frozen encoder."""

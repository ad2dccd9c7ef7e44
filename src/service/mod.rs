//! Starts the parts: the supervisor behind `lockstep up`, and a cluster inside the caller's
//! process.

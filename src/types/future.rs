use std::{marker::PhantomData, time::Duration};

use super::{ForwardBackwardOutput, OperationError};

/// Handle to a long-running operation.
pub struct OperationFuture<T>(PhantomData<T>);

/// The other end of an [`OperationFuture`].
pub struct OperationCompleter<T>(PhantomData<T>);

/// What `forward` and `forward_backward` return: joins the parts of a call that was split.
pub type ForwardBackwardFuture = OperationFuture<ForwardBackwardOutput>;

/// The time given to [`OperationFuture::result_timeout`] ran out; the operation goes on.
#[derive(Debug)]
pub struct ResultTimeout(pub Duration);

#[allow(dead_code)]
type Outcome<T> = Result<T, OperationError>;

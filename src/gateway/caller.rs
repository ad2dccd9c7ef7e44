//! Who asks, and the gateway as they see it: with their own runs and checkpoints alone.

use std::{
    future::{Ready, ready},
    ops::Deref,
};

use actix_web::{FromRequest, HttpMessage, HttpRequest, dev::Payload, http::header::AUTHORIZATION, web};

use super::{
    Gateway,
    body::{Bodies, Body},
    keys,
    refusal::Refused,
    upstream::Upstream,
};

/// Taken out of every request that needs a key. A handler without one serves anybody.
pub(super) struct Caller {
    gateway: web::Data<Gateway>,
    /// Name of the key; absent: the service has no keys, and everything belongs to everybody.
    pub name: Option<String>,
    pub upstream: Upstream,
    /// Room for the bodies of this caller alone.
    own_bodies: Option<Bodies>,
}

impl Caller {
    pub fn of(request: &HttpRequest) -> Result<Self, Refused> {
        let gateway = request.app_data::<web::Data<Gateway>>();
        let gateway = gateway.ok_or_else(|| Refused::fault("a route without its gateway"))?.clone();
        let (name, limits, own_bodies) = match &gateway.keys {
            None => (None, &gateway.limits, None),
            Some(known) => {
                let given = request.headers().get(AUTHORIZATION);
                let given = given.ok_or_else(|| {
                    Refused::unauthorized("this service needs `Authorization: Api-Key KEY`")
                })?;
                let key = given.to_str().ok().and_then(keys::key_of);
                let known = key.and_then(|key| known.find(key));
                let known = known.ok_or_else(|| Refused::unauthorized("this API key is not known here"))?;
                (Some(known.name.clone()), &known.limits, Some(known.bodies.clone()))
            }
        };
        let upstream = gateway.everything.seen_by(name.clone(), limits.quota);
        let upstream = upstream.traced(request.extensions().get().copied());
        Ok(Self { name, upstream, own_bodies, gateway })
    }

    /// Reads a body of at most `limit` bytes, once there is room for it.
    pub async fn read(
        &self,
        request: &HttpRequest,
        payload: web::Payload,
        limit: usize,
    ) -> Result<Body, Refused> {
        self.bodies.read(self.own_bodies.as_ref(), request, payload, limit).await
    }
}

impl Deref for Caller {
    type Target = Gateway;

    fn deref(&self) -> &Gateway {
        &self.gateway
    }
}

impl FromRequest for Caller {
    type Error = Refused;
    type Future = Ready<Result<Self, Refused>>;

    fn from_request(request: &HttpRequest, _body: &mut Payload) -> Self::Future {
        ready(Self::of(request))
    }
}

//! The Loops dialect: what the Python client `baseten-loops` speaks.
//!
//! ```text
//!   /v1/loops, /v1/teams/{team}/loops      control plane           control
//!   /v1/loops/runs/{run}/trainer           one run's trainer       operations, readiness
//!   /v1/loops/samplers/{id}/serve          one sampler             sampler, sample
//!   /v1/loops/checkpoints                  saved weights           checkpoints
//!   /                                      a trainer and a sampler without control plane, on
//!                                          loopback without keys   local
//! ```
//!
//! Runs and samplers are dedicated ones, in the client's words: only these have a policy
//! version. Ids speak for themselves (an operation's names its run and place, a sampler's its
//! source), so that a gateway that comes back knows every one of them.

mod ids;
mod local;
mod mount;

mod control;
mod operations;
mod readiness;
mod results;

mod completion;
mod sample;
mod sampler;

mod checkpoints;

use actix_web::web;

pub use completion::Completion;

/// The routes of this dialect.
pub fn routes(app: &mut web::ServiceConfig) {
    for root in ["/v1/loops", "/v1/teams/{team}/loops"] {
        let at = |path: &str| format!("{root}{path}");
        app.route(&at("/sessions"), web::post().to(control::create_session))
            .route(&at("/trainers"), web::post().to(control::create_trainer))
            .route(&at("/debug/trainers"), web::post().to(control::create_trainer))
            .route(&at("/samplers"), web::post().to(sampler::create_sampler))
            .route(&at("/debug/samplers"), web::post().to(sampler::create_sampler));
    }
    app.route("/v1/teams", web::get().to(control::teams))
        .route("/v1/loops/capabilities", web::get().to(control::capabilities))
        .route("/v1/loops/deployments/{run}", web::get().to(readiness::deployment))
        .route("/v1/loops/runs", web::get().to(control::runs))
        .route("/v1/loops/runs/{run}", web::delete().to(control::delete_run))
        .route("/v1/models/{model}/deployments/{deployment}", web::get().to(sampler::deployment));
    app.route("/v1/loops/checkpoints", web::get().to(checkpoints::list))
        .route("/v1/loops/checkpoints/{id}", web::delete().to(checkpoints::delete))
        .route("/v1/loops/checkpoints/validate", web::post().to(checkpoints::validate))
        .route("/v1/loops/checkpoints/{id}/source", web::get().to(checkpoints::source))
        .route("/v1/loops/checkpoints/{id}/files", web::get().to(checkpoints::files))
        .route("/v1/loops/checkpoints/{id}/files/{name:.+}", web::get().to(checkpoints::file))
        .route("/v1/loops/checkpoints/{id}/files/{name:.+}", web::head().to(checkpoints::file));
    app.route("/v1/loops/runs/{run}/trainer/health", web::get().to(readiness::trainer_health))
        .route("/v1/loops/samplers/{sampler}/serve/health", web::get().to(sampler::awake));
    trainer(app, "/v1/loops/runs/{run}/trainer");
    serve(app, "/v1/loops/samplers/{sampler}/serve");
}

/// A trainer and a sampler without a control plane: for callers that anyone may be.
pub fn local_routes(app: &mut web::ServiceConfig) {
    trainer(app, "");
    serve(app, "");
}

/// A sampler's routes below `base`.
fn serve(app: &mut web::ServiceConfig, base: &str) {
    let at = |path: &str| format!("{base}{path}");
    app.route(&at("/sample"), web::post().to(sample::sample))
        .route(&at("/v1/models"), web::get().to(sampler::models))
        .route(&at("/trainers_policy_version"), web::get().to(sampler::policy_version))
        .route(&at("/wake"), web::post().to(sampler::awake));
}

/// A trainer's routes below `base`.
fn trainer(app: &mut web::ServiceConfig, base: &str) {
    let at = |path: &str| format!("{base}{path}");
    app.route(&at("/policy_version"), web::get().to(readiness::policy_version))
        .route(&at("/init_trainer_server"), web::post().to(operations::init_trainer_server))
        .route(&at("/forward"), web::post().to(operations::forward))
        .route(&at("/forward_backward"), web::post().to(operations::forward_backward))
        .route(&at("/optim_step"), web::post().to(operations::optim_step))
        .route(&at("/save_state"), web::post().to(operations::save_state))
        .route(&at("/save_weights_for_sampler"), web::post().to(operations::save_weights_for_sampler))
        .route(&at("/load_state"), web::post().to(operations::load_state))
        .route(&at("/load_state_with_optimizer"), web::post().to(operations::load_state_with_optimizer))
        .route(&at("/operations/{id}"), web::get().to(operations::poll));
}

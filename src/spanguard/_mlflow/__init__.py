"""The only module that knows MLflow beyond its public names.

Each private or half-public touch, why it is needed, and what happens where it is missing:

=============================================  ==================================================
touch                                          reason; without it
=============================================  ==================================================
`tracing.provider.get_context_api`-like pair   the ambient span must be MLflow's active span, and
`mlflow_runtime_context` / OTel `context`      be restored also from another context, which tokens
                                               cannot do; without: AttributeError at import, a
                                               supported MLflow has it (3.10 to 3.17 read)
`tracing.provider.provider`, `_get_tracer`     to hear of every span whichever API opens it, one
                                               OpenTelemetry span processor is added to MLflow's
                                               provider; without: only our own spans are guarded
`tracing.context._USER_TRACE_CONTEXT`          to honour `context(enabled=False)` when a child is
                                               started by the watched provider's tracer itself;
                                               without: there is no such setting (3.10)
`tracing.provider._trace_disabled_state`       tells a hidden provider from a replaced one;
                                               without: a hidden one counts as replaced
`InMemoryTraceManager` and its `_traces`       the live span of an id, and whether a trace was
                                               evicted; without the latter: eviction goes unnoticed
its `_traces`, `_lock`, and of the buffer the  open traces must outlive MLflow's limits: the
`ttl` and `maxsize`, of a trace `span_dict`,   buffer is replaced by one that keeps them;
`is_remote_trace`; `_otel_id_to_mlflow_...`    without: a warning before the first loss
`LiveSpan._span` and the OpenTelemetry span's  ending without MLflow's decorations when the full
`_status`, `_attributes`                       end failed; ERROR after OK; the number of attributes
a span processor's `_on_ending`, and the       where another API ends a span of ours as ERROR, it
`_events` of a span                            gets the event that MLflow's page paints red by;
                                               without: its status alone says it
`tracing.utils.TraceJSONEncoder`               to know beforehand what MLflow's own dump will do;
                                               without: `json` with `default=str`
`tracing.sampling._SAMPLING_RATIO_OVERRIDE`    `sampling_ratio_override=`, which MLflow's decorator
                                               sets; without: the ratio is ignored
`_MlflowSampler` of a provider, and a          its decision is to be that of the whole trace, which
`NoOpSpan`'s `_span`                           3.10 takes anew for each span; without: unchanged
`SpanLogLevel.from_value`                      to tell of a wrong log level before the span opens;
                                               without (3.10): there are none
the `_dict` of OpenTelemetry's attributes      whether outputs were set in the body; without: the
                                               same, slower
`tracing.attachments.Attachment`               must not be rewritten; without (3.10): there are none
the loggers of what starts and ends spans      MLflow swallows what a signal handler raises in the
                                               middle of it, with one line in its log; without: or
                                               where that line is switched off, it stays swallowed
the OpenTelemetry span's `_span_processor`     an end that Ctrl-C interrupts before MLflow hears of
and `_readable_span`                           it is told after all; without: that span is lost
the OpenTelemetry span's `_lock`               whether a span is being written, by this very thread
                                               where a finalizer runs in the middle of it; without:
                                               closing it there is not put aside
`exporter._deferred_root_spans`                whether MLflow keeps a root back whose children run
                                               on; without: they are closed when the root ends
`exporter._async_queue._queue`                 to wait for what is pending without stopping MLflow's
                                               threads; without: MLflow's own, slower flush
the `maxsize` of that queue, and the `_queue`  room for a burst of ends; without: MLflow drops what
and `_max_queue_size` of the batch processor   does not fit, with a line in its log
`InMemoryTraceManager.register_trace`,         spans of a trace that another process began; MLflow's
`pop_trace`, `TraceInfo`                       public way drops them before their batch is exported;
                                               without: a carried span starts a trace of its own
`tracking.fluent._active_experiment_id`        the experiment in force, without asking the store;
                                               without: `set_experiment` in a worker process
`trace.info` of a live trace                   its name, request id and previews after its start,
                                               also where it is not the active one; without:
                                               unchanged
`exporter._client` and, on it, `log_spans`,    what became of each trace: MLflow swallows refusals;
`start_trace`, `_upload_trace_data`; the       without: `flush` takes for stored what was handed
processor's `_start_trace`, the queues' `put`  over
and `drop_items`, `_should_log_spans_to_...`,
a line in the log of MLflow's SQL store
`OtelSpanProcessor.on_end` and the exporter's  the same where only an OTLP endpoint is set; and
`export`, `_should_register_traces`            MLflow's own fails there on a root with user tags
`concurrent.futures.thread._threads_queues`,   the exit of the process must not wait for a dead
`_worker_threadpool`, `_at_exit_callback`      server; without: it waits as long as MLflow does
`_async_queue.activate`                        Python 3.12.1 starts no threads at exit; without:
                                               it loses there what ended in the last seconds
the provider, its once-flags and exit hook,    after a fork the child must not touch what the
the exporter's queue, the stores' engines, a   parent's threads held locked; without: what is
span's `_attributes`, `_events`, `_links`      missing stays as MLflow leaves it after a fork
SQLAlchemy's `pool._do_get`, `checkedout`      no thread may be inside SQLite while the process
                                               forks; without: the fork does not wait for it
`id_generator` of the tracer and the provider  a chosen trace id; without: the id is not chosen,
                                               which is noticed at the span and warned of
the class of the provider's `id_generator`     ids that no `random.seed()` repeats, in the tracers
                                               too that share it; without: seeded ids repeat
`TracingClient().store.get_trace_info`         whether a trace exists: the public `get_trace` cannot
                                               tell that from a store that does not answer;
                                               without: AttributeError, contained: the id is free
`provider._initialize_tracer_provider`         ids of our own from a provider's first span on, and
                                               in a test run to be on every provider that MLflow
                                               makes; without: only on those before spans of ours
`MlflowV3SpanProcessor` and its `_start_trace` a test's spans are made as MLflow makes them, and no
                                               store is asked; without: `record_spans` raises
the provider, its once-flags, the tracking     a test's recording puts back what it found, without
URI, experiment and destination in force       a flush or reset; without: what is missing stays
=============================================  ==================================================
"""

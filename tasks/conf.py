"""Celery's settings for this project, each with its reason. Measured on Celery 5.6 and kombu 5.7."""

from __future__ import annotations

from celery import Celery

from configs.schema import Settings

PRIORITY_STEPS = [0, 3, 6, 9]  # 0 is the most urgent in kombu's Redis transport


def configure(app: Celery, settings: Settings) -> None:
    """Settings that gateway, supervisor and workers share."""
    app.conf.update(
        broker_url=settings.state.broker_url,
        result_backend=settings.state.broker_url,
        broker_connection_retry_on_startup=True,
        # Nothing that crosses a process is ever pickled.
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        accept_content=["json"],
        broker_transport_options={
            # A lease: the pool renews it for what it holds, a dead worker's messages come back after this long.
            "visibility_timeout": settings.state.visibility_timeout_s,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,  # sweep each second; kombu's own rhythm is 100 s
            "queue_order_strategy": "priority",
            "priority_steps": PRIORITY_STEPS,
            "socket_timeout": 10,
            "socket_connect_timeout": 2,
        },
        task_acks_late=True,  # the prefetch credit counts unacked messages; a death gives them back
        task_reject_on_worker_lost=True,
        task_ignore_result=True,  # tokens go by streams
        result_expires=600,  # what is stored still: revocations
        task_track_started=False,
        task_send_sent_event=False,
        worker_send_task_events=True,
    )


def configure_worker(app: Celery) -> None:
    """Settings of a worker only."""
    app.conf.update(
        worker_pool="tasks.pool:EnginePool",
        worker_prefetch_multiplier=1,  # credit = concurrency
        worker_disable_rate_limits=True,
        worker_enable_remote_control=True,
        # Live sequences survive a broker reconnect: their messages are adopted when they are delivered again.
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=0,  # the pool drains by itself
    )

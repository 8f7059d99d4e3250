target datalayout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
target triple = "x86_64-unknown-linux-gnu"

define hidden i32 @dense(ptr %frame, ptr noalias %arg0, ptr noalias %arg1, ptr noalias %arg2) #0 {
entry:
  %buf1 = alloca [16 x float], align 32
  br label %loop2
loop2:
  %i4 = phi i64 [ 0, %entry ], [ %t93, %done6 ]
  br label %loop5
loop5:
  %i7 = phi i64 [ 0, %loop2 ], [ %t91, %join11 ]
  %t8 = mul nsw i64 %i7, 8
  %t9 = icmp sgt i64 13, %t8
  br i1 %t9, label %then10, label %else12
then10:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf1, align 32
  %t13 = getelementptr inbounds float, ptr %buf1, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t13, align 32
  br label %loop14
loop14:
  %i16 = phi i64 [ 0, %then10 ], [ %t38, %loop14 ]
  %t17 = mul nsw i64 %i4, 10
  %t18 = add nsw i64 %t17, %i16
  %t19 = getelementptr inbounds float, ptr %arg0, i64 %t18
  %t20 = load float, ptr %t19, align 4
  %t21 = mul nsw i64 %i16, 20
  %t22 = add nsw i64 %t8, %t21
  %t23 = getelementptr inbounds float, ptr %arg1, i64 %t22
  %t24 = load <8 x float>, ptr %t23, align 4
  %t25 = load <8 x float>, ptr %buf1, align 32
  %t26 = insertelement <8 x float> poison, float %t20, i64 0
  %t27 = shufflevector <8 x float> %t26, <8 x float> poison, <8 x i32> zeroinitializer
  %t28 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t27, <8 x float> %t24, <8 x float> %t25)
  store <8 x float> %t28, ptr %buf1, align 32
  %t29 = getelementptr inbounds float, ptr %t19, i64 5
  %t30 = load float, ptr %t29, align 4
  %t31 = load <8 x float>, ptr %t23, align 4
  %t32 = getelementptr inbounds float, ptr %buf1, i64 8
  %t33 = load <8 x float>, ptr %t32, align 32
  %t34 = insertelement <8 x float> poison, float %t30, i64 0
  %t35 = shufflevector <8 x float> %t34, <8 x float> poison, <8 x i32> zeroinitializer
  %t36 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t35, <8 x float> %t31, <8 x float> %t33)
  %t37 = getelementptr inbounds float, ptr %buf1, i64 8
  store <8 x float> %t36, ptr %t37, align 32
  %t38 = add nuw nsw i64 %i16, 1
  %t39 = icmp slt i64 %t38, 5
  br i1 %t39, label %loop14, label %done15
done15:
  %t40 = load <8 x float>, ptr %buf1, align 32
  %t41 = mul nsw i64 %i4, 40
  %t42 = mul nsw i64 %i7, 8
  %t43 = add nsw i64 %t41, %t42
  %t44 = getelementptr inbounds float, ptr %arg2, i64 %t43
  store <8 x float> %t40, ptr %t44, align 4
  %t45 = getelementptr inbounds float, ptr %buf1, i64 8
  %t46 = load <8 x float>, ptr %t45, align 32
  %t47 = getelementptr inbounds float, ptr %t44, i64 20
  store <8 x float> %t46, ptr %t47, align 4
  br label %join11
else12:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf1, align 32
  %t48 = getelementptr inbounds float, ptr %buf1, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t48, align 32
  br label %loop49
loop49:
  %i51 = phi i64 [ 0, %else12 ], [ %t77, %loop49 ]
  %t52 = insertelement <8 x i64> poison, i64 %t8, i64 0
  %t53 = shufflevector <8 x i64> %t52, <8 x i64> poison, <8 x i32> zeroinitializer
  %t54 = add <8 x i64> %t53, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t55 = icmp slt <8 x i64> %t54, splat (i64 20)
  %t56 = mul nsw i64 %i4, 10
  %t57 = add nsw i64 %t56, %i51
  %t58 = getelementptr inbounds float, ptr %arg0, i64 %t57
  %t59 = load float, ptr %t58, align 4
  %t60 = mul nsw i64 %i51, 20
  %t61 = add nsw i64 %t8, %t60
  %t62 = getelementptr inbounds float, ptr %arg1, i64 %t61
  %t63 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t62, <8 x i1> %t55, <8 x float> zeroinitializer)
  %t64 = load <8 x float>, ptr %buf1, align 32
  %t65 = insertelement <8 x float> poison, float %t59, i64 0
  %t66 = shufflevector <8 x float> %t65, <8 x float> poison, <8 x i32> zeroinitializer
  %t67 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t66, <8 x float> %t63, <8 x float> %t64)
  store <8 x float> %t67, ptr %buf1, align 32
  %t68 = getelementptr inbounds float, ptr %t58, i64 5
  %t69 = load float, ptr %t68, align 4
  %t70 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t62, <8 x i1> %t55, <8 x float> zeroinitializer)
  %t71 = getelementptr inbounds float, ptr %buf1, i64 8
  %t72 = load <8 x float>, ptr %t71, align 32
  %t73 = insertelement <8 x float> poison, float %t69, i64 0
  %t74 = shufflevector <8 x float> %t73, <8 x float> poison, <8 x i32> zeroinitializer
  %t75 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t74, <8 x float> %t70, <8 x float> %t72)
  %t76 = getelementptr inbounds float, ptr %buf1, i64 8
  store <8 x float> %t75, ptr %t76, align 32
  %t77 = add nuw nsw i64 %i51, 1
  %t78 = icmp slt i64 %t77, 5
  br i1 %t78, label %loop49, label %done50
done50:
  %t79 = insertelement <8 x i64> poison, i64 %t8, i64 0
  %t80 = shufflevector <8 x i64> %t79, <8 x i64> poison, <8 x i32> zeroinitializer
  %t81 = add <8 x i64> %t80, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t82 = icmp slt <8 x i64> %t81, splat (i64 20)
  %t83 = load <8 x float>, ptr %buf1, align 32
  %t84 = mul nsw i64 %i4, 40
  %t85 = mul nsw i64 %i7, 8
  %t86 = add nsw i64 %t84, %t85
  %t87 = getelementptr inbounds float, ptr %arg2, i64 %t86
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t83, ptr align 4 %t87, <8 x i1> %t82)
  %t88 = getelementptr inbounds float, ptr %buf1, i64 8
  %t89 = load <8 x float>, ptr %t88, align 32
  %t90 = getelementptr inbounds float, ptr %t87, i64 20
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t89, ptr align 4 %t90, <8 x i1> %t82)
  br label %join11
join11:
  %t91 = add nuw nsw i64 %i7, 1
  %t92 = icmp slt i64 %t91, 3
  br i1 %t92, label %loop5, label %done6
done6:
  %t93 = add nuw nsw i64 %i4, 1
  %t94 = icmp slt i64 %t93, 3
  br i1 %t94, label %loop2, label %done3
done3:
  ret i32 0
}

declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare <8 x float> @llvm.masked.load.v8f32.p0(ptr, <8 x i1>, <8 x float>)
declare void @llvm.masked.store.v8f32.p0(<8 x float>, ptr, <8 x i1>)

attributes #0 = { nounwind "no-builtins" "tune-cpu"="x86-64-v3" "prefer-vector-width"="256" "min-legal-vector-width"="256" }

!llvm.module.flags = !{!0, !1}
!0 = !{i32 8, !"PIC Level", i32 2}
!1 = !{i32 7, !"uwtable", i32 0}
